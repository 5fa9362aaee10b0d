//! The `local` lane: the service traits called directly.
