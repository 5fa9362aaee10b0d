//! The `grpc` lane: the service traits over tonic clients.
