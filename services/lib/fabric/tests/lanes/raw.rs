//! The `tcp` lane spoken by hand, from docs/protocol.md: no code of the lane's own.

use futures::StreamExt;
use longshore_blocks::crc32c;
use longshore_proto::{
    types::TileMessage,
    v1::{self, kv_store_service_client::KvStoreServiceClient, put_blocks_request::Part},
};
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::TcpStream,
    sync::mpsc,
};
use tokio_stream::wrappers::ReceiverStream;
use tonic::{Status, Streaming, transport::Channel};

use super::{
    fake::{identity, shape},
    house::{House, LONG},
};

pub(crate) const MAGIC: [u8; 8] = *b"LSTCP\0\0\x01";
pub(crate) const TILE: u32 = 1;
pub(crate) const MISSING: u32 = 3;
pub(crate) const END: u32 = 4;

pub(crate) type Client = KvStoreServiceClient<Channel>;

pub(crate) async fn client(house: &House) -> Client {
    let channel = Channel::from_shared(house.address.clone()).unwrap().connect().await.unwrap();
    KvStoreServiceClient::new(channel)
}

pub(crate) async fn offer(client: &mut Client) -> Result<v1::OpenTileConnectionResponse, Status> {
    let offer = client.open_tile_connection(v1::OpenTileConnectionRequest {}).await;
    offer.map(tonic::Response::into_inner)
}

pub(crate) async fn dial(port: u32) -> TcpStream {
    TcpStream::connect(("127.0.0.1", port as u16)).await.unwrap()
}

pub(crate) fn hello(id: u64, token: &[u8]) -> Vec<u8> {
    [&MAGIC[..], &id.to_le_bytes(), token].concat()
}

/// Whether the server confirmed; when it did not it closed the connection.
pub(crate) async fn is_confirmed(socket: &mut TcpStream) -> bool {
    let mut answer = [0; 8];
    socket.read_exact(&mut answer).await.is_ok() && answer == MAGIC
}

/// An open connection, and what a call says of it.
pub(crate) async fn open(client: &mut Client) -> (TcpStream, v1::TileConnection) {
    let offer = offer(client).await.unwrap();
    let mut socket = dial(offer.port).await;
    socket.write_all(&hello(offer.id, &offer.token)).await.unwrap();
    assert!(is_confirmed(&mut socket).await);
    (socket, v1::TileConnection { id: offer.id, token: offer.token, lease: 1 })
}

/// The head of a frame; `change` may spoil it before its checksum is taken.
pub(crate) fn head(lease: u64, number: u32, kind: u32, change: impl FnOnce(&mut [u8])) -> Vec<u8> {
    let mut head = vec![0; 92];
    head[..8].copy_from_slice(&lease.to_le_bytes());
    head[8..12].copy_from_slice(&number.to_le_bytes());
    head[12..16].copy_from_slice(&kind.to_le_bytes());
    change(&mut head);
    let check = crc32c(&head);
    head.extend(check.to_le_bytes());
    head
}

/// A tile's frame with its body.
pub(crate) fn frame(number: u32, tile: &TileMessage) -> Vec<u8> {
    let mut frame = head(1, number, TILE, |head| {
        head[16..20].copy_from_slice(&(tile.data.len() as u32).to_le_bytes());
        head[20..24].copy_from_slice(&tile.crc32c.to_le_bytes());
        head[24..28].copy_from_slice(&tile.layer.to_le_bytes());
        head[28..44].copy_from_slice(&tile.key.0);
    });
    frame.extend_from_slice(&tile.data);
    frame
}

pub(crate) fn end(number: u32) -> Vec<u8> {
    head(1, number, END, |_| ())
}

/// The first message of a store stream with its tiles on `connection`.
pub(crate) fn start(connection: v1::TileConnection) -> v1::PutBlocksRequest {
    let (identity, shape) = (Some(identity().into()), Some(shape().into()));
    let start = v1::PutBlocksStart { identity, shape, connection: Some(connection), nccl: None };
    v1::PutBlocksRequest { part: Some(Part::Start(start)) }
}

/// A store stream that stays open for as long as the sender lives.
pub(crate) async fn put(
    client: &mut Client,
    connection: v1::TileConnection,
) -> Result<(mpsc::Sender<v1::PutBlocksRequest>, Streaming<v1::PutBlocksResponse>), Status> {
    let (sender, messages) = mpsc::channel(4);
    sender.send(start(connection)).await.unwrap();
    let acks = client.put_blocks(ReceiverStream::new(messages)).await?;
    Ok((sender, acks.into_inner()))
}

/// What a store stream answers to `bytes`: its acknowledgements and, if it failed, why.
pub(crate) async fn put_bytes(
    client: &mut Client,
    bytes: &[u8],
) -> (Vec<v1::PutBlocksResponse>, Option<Status>) {
    let (mut socket, connection) = open(client).await;
    let (_sender, mut acks) = put(client, connection).await.unwrap();
    let sending = async {
        // The server may close in the middle of it.
        socket.write_all(bytes).await.ok();
        socket.shutdown().await.ok();
    };
    let receiving = async {
        let mut good = Vec::new();
        while let Some(ack) = acks.next().await {
            match ack {
                Ok(ack) => good.push(ack),
                Err(status) => return (good, Some(status)),
            }
        }
        (good, None)
    };
    tokio::join!(receiving, sending).0
}

/// Whether the peer closed the connection; waits for that.
pub(crate) async fn is_closed(socket: &mut TcpStream) -> bool {
    let mut rest = [0; 4096];
    let reading = async { while let Ok(1..) = socket.read(&mut rest).await {} };
    tokio::time::timeout(LONG, reading).await.is_ok()
}
