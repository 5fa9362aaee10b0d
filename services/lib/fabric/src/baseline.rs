//! Tiles over stock tonic: the generated client and server with the settings that they have by themselves. Nothing serves
//! this way; `longshore bench store` measures it, and tests let it talk to our own client and server.

use std::sync::Arc;

use longshore_proto::v1::kv_store_service_server::KvStoreServiceServer;
use tokio::net::TcpListener;
use tokio_stream::wrappers::TcpListenerStream;
use tokio_util::sync::CancellationToken;
use tonic::transport::{Channel, Server};

use crate::{Code, Error, Shard, grpc, server};

/// Largest message that either side takes.
const MESSAGE_BYTES_MAX: usize = 16 << 20;

/// Serves `shard` over the generated server until `shutdown` fires.
pub async fn serve(
    listener: TcpListener,
    shard: Arc<dyn Shard>,
    shutdown: CancellationToken,
) -> Result<(), Error> {
    let service = KvStoreServiceServer::new(server::stock(shard))
        .max_decoding_message_size(MESSAGE_BYTES_MAX)
        .max_encoding_message_size(MESSAGE_BYTES_MAX);
    let sockets = TcpListenerStream::new(listener);
    let serving = Server::builder()
        .add_service(service)
        .serve_with_incoming_shutdown(sockets, shutdown.cancelled_owned());
    serving.await.map_err(|error| Error::new(Code::Internal, format!("the gRPC listener failed: {error}")))
}

/// The generated client of the shard at `address`, over one connection. Must be called on a runtime.
pub fn shard(address: &str) -> Result<Arc<dyn Shard>, Error> {
    let endpoint = Channel::from_shared(address.to_owned())
        .map_err(|_| Error::invalid("address", format!("is `{address}`, must be `http://HOST:PORT`")))?;
    Ok(grpc::stock(endpoint.connect_lazy(), MESSAGE_BYTES_MAX))
}
