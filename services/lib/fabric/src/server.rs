//! gRPC servers: listeners with health, reflection, limits and graceful shutdown.
