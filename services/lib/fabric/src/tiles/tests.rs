//! The hand-written codec against Prost, which is the specification.

mod damage;

use std::collections::VecDeque;

use bytes::{Buf, Bytes};
use longshore_blocks::{BlockKey, BlockPlace, crc32c};
use longshore_proto::{
    types::{TileData, TileMessage},
    v1::{self, put_blocks_request::Part},
};
use proptest::prelude::*;
use prost::Message;

use super::{
    PREFIX_BYTES, Rope, TileRequest,
    encode::{get_tile, put_tile},
    tile_answer, tile_request,
};

fn tile(key: [u8; 16], layer: u32, data: Vec<u8>) -> TileMessage {
    let index = u64::from(layer) * u64::from(layer);
    let place = key[0].is_multiple_of(2).then_some(BlockPlace { stripe_seed: [key[1]; 32], index });
    TileMessage { key: BlockKey(key), layer, crc32c: crc32c(&data), data: data.into(), place }
}

/// `bytes` in pieces that end at `cuts`.
fn rope(bytes: &[u8], cuts: &[usize]) -> Rope {
    let mut rope = Rope::default();
    let mut begin = 0;
    let mut ends: Vec<usize> = cuts.iter().map(|cut| cut % (bytes.len() + 1)).collect();
    ends.push(bytes.len());
    ends.sort_unstable();
    for end in ends {
        rope.push(Bytes::copy_from_slice(&bytes[begin..end]));
        begin = end;
    }
    rope
}

fn joined(frames: VecDeque<Bytes>) -> Vec<u8> {
    frames.iter().flat_map(|frame| frame.to_vec()).collect()
}

fn body_of(frames: VecDeque<Bytes>) -> Vec<u8> {
    let all = joined(frames);
    assert_eq!(all[0], 0, "not compressed");
    assert_eq!(
        u32::from_be_bytes(all[1..PREFIX_BYTES].try_into().unwrap()) as usize,
        all.len() - PREFIX_BYTES
    );
    all[PREFIX_BYTES..].to_vec()
}

proptest! {
    #[test]
    fn prost_reads_what_we_send(key: [u8; 16], layer: u32, data in prop::collection::vec(any::<u8>(), 0..20_000)) {
        let sent = tile(key, layer, data);
        let mut frames = VecDeque::new();
        put_tile(&sent, &mut frames);
        let read = v1::PutBlocksRequest::decode(&*body_of(frames)).unwrap();
        let Some(Part::Tile(read)) = read.part else { panic!("no tile: {read:?}") };
        prop_assert_eq!(TileMessage::try_from(read).unwrap(), sent.clone());
        let mut frames = VecDeque::new();
        get_tile(&sent, &mut frames);
        let read = v1::GetBlocksResponse::decode(&*body_of(frames)).unwrap();
        prop_assert_eq!(Option::<TileMessage>::try_from(read).unwrap(), Some(sent));
    }

    #[test]
    fn we_read_what_prost_sends_however_it_is_cut(
        key: [u8; 16], layer: u32, data in prop::collection::vec(any::<u8>(), 0..5_000), cuts in prop::collection::vec(any::<usize>(), 0..6),
    ) {
        let sent = tile(key, layer, data);
        let message = v1::PutBlocksRequest { part: Some(Part::Tile(sent.clone().into())) };
        let TileRequest::Tile(read) = tile_request(rope(&message.encode_to_vec(), &cuts)).unwrap() else {
            panic!("a usual tile is parsed by hand")
        };
        prop_assert_eq!(&read, &sent);
        let message = v1::GetBlocksResponse::from(Some(sent.clone()));
        let read = tile_answer(rope(&message.encode_to_vec(), &cuts)).unwrap();
        prop_assert_eq!(read.unwrap(), sent);
    }

    /// Whatever bytes come, we and Prost agree on them, or Prost alone decides.
    #[test]
    fn damaged_messages_mean_what_prost_says(
        data in prop::collection::vec(any::<u8>(), 0..40), flips in prop::collection::vec((any::<usize>(), any::<u8>()), 0..4), cut: usize,
    ) {
        let message = v1::PutBlocksRequest { part: Some(Part::Tile(tile([7; 16], 300, data).into())) };
        let mut bytes = message.encode_to_vec();
        for (at, with) in flips {
            let at = at % bytes.len();
            bytes[at] ^= with;
        }
        bytes.truncate(bytes.len() - cut % 3);
        let ours = tile_request(rope(&bytes, &[cut]));
        match (ours, v1::PutBlocksRequest::decode(&*bytes)) {
            (Ok(TileRequest::Other(ours)), Ok(theirs)) => prop_assert_eq!(ours, theirs),
            (Ok(TileRequest::Tile(ours)), Ok(v1::PutBlocksRequest { part: Some(Part::Tile(theirs)) })) => {
                prop_assert_eq!(ours, TileMessage::try_from(theirs).unwrap());
            }
            (Err(_), Err(_)) => {}
            (ours, theirs) => prop_assert!(false, "{ours:?} against {theirs:?}"),
        }
    }
}

#[test]
fn bodies_are_lent_and_not_copied() {
    let body = Bytes::from(vec![5; 100_000]);
    let lent = body.as_ptr();
    let sent = TileMessage {
        key: BlockKey([1; 16]),
        layer: 3,
        crc32c: crc32c(&body),
        data: body.into(),
        place: None,
    };
    let mut frames = VecDeque::new();
    put_tile(&sent, &mut frames);
    assert_eq!(frames.len(), 2);
    assert_eq!(frames[1].as_ptr(), lent);
    let mut message = Rope::default();
    frames[0].advance(PREFIX_BYTES);
    frames.into_iter().for_each(|frame| message.push(frame));
    let TileRequest::Tile(read) = tile_request(message).unwrap() else { panic!("a tile") };
    assert_eq!(read.data.contiguous().as_ptr(), lent);
}

#[test]
fn bodies_in_pieces_stay_in_pieces() {
    let pieces = vec![Bytes::from(vec![1; 300]), Bytes::from(vec![2; 700])];
    let lent: Vec<_> = pieces.iter().map(|piece| piece.as_ptr()).collect();
    let data = TileData::from_pieces(pieces);
    let sent = TileMessage {
        key: BlockKey([1; 16]),
        layer: 0,
        crc32c: crc32c(&data),
        data: data.clone(),
        place: None,
    };
    let mut frames = VecDeque::new();
    get_tile(&sent, &mut frames);
    assert_eq!(frames.iter().skip(1).map(|frame| frame.as_ptr()).collect::<Vec<_>>(), lent);
}
