//! Errors of membership.
