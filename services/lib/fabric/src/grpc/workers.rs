//! [`Prefiller`] and [`Decoder`] over their services.

use async_trait::async_trait;
use longshore_proto::{
    types::{DecodeEvent, DecodeStart, PrefillEvent, PrefillStart},
    v1::{
        self, decode_request, decode_service_client::DecodeServiceClient, prefill_request,
        prefill_service_client::PrefillServiceClient,
    },
};
use tokio::sync::mpsc;
use tonic::transport::Channel;

use super::call::{messages, request, streaming, token_chunks};
use crate::{BoxStream, CallContext, Decoder, Error, Prefiller, lane::Hop};

/// A prefill worker behind an address.
#[derive(Debug)]
pub(super) struct PrefillerClient {
    client: PrefillServiceClient<Channel>,
}

impl PrefillerClient {
    pub(super) fn new(channel: Channel, message_bytes_max: usize) -> Self {
        let client = PrefillServiceClient::new(channel)
            .max_decoding_message_size(message_bytes_max)
            .max_encoding_message_size(message_bytes_max);
        Self { client }
    }
}

#[async_trait]
impl Prefiller for PrefillerClient {
    async fn prefill(
        &self,
        ctx: &CallContext,
        start: PrefillStart,
        tokens: mpsc::Receiver<Vec<u32>>,
    ) -> Result<BoxStream<PrefillEvent>, Error> {
        use prefill_request::Part;
        let hop = Hop::new(ctx);
        let part = |part| v1::PrefillRequest { part: Some(part) };
        let start = part(Part::Start(start.into()));
        let tokens = messages(&hop.context, Some(start), tokens, move |tokens| {
            token_chunks(tokens).into_iter().map(|chunk| part(Part::Tokens(chunk.into()))).collect()
        });
        let request = request(&hop.context, tokens)?;
        let mut client = self.client.clone();
        streaming(hop, client.prefill(request), PrefillEvent::try_from).await
    }
}

/// A decode worker behind an address.
#[derive(Debug)]
pub(super) struct DecoderClient {
    client: DecodeServiceClient<Channel>,
}

impl DecoderClient {
    pub(super) fn new(channel: Channel, message_bytes_max: usize) -> Self {
        let client = DecodeServiceClient::new(channel)
            .max_decoding_message_size(message_bytes_max)
            .max_encoding_message_size(message_bytes_max);
        Self { client }
    }
}

#[async_trait]
impl Decoder for DecoderClient {
    async fn decode(
        &self,
        ctx: &CallContext,
        start: DecodeStart,
        tokens: mpsc::Receiver<Vec<u32>>,
    ) -> Result<BoxStream<DecodeEvent>, Error> {
        use decode_request::Part;
        let hop = Hop::new(ctx);
        let part = |part| v1::DecodeRequest { part: Some(part) };
        let start = part(Part::Start(start.into()));
        let tokens = messages(&hop.context, Some(start), tokens, move |tokens| {
            token_chunks(tokens).into_iter().map(|chunk| part(Part::Tokens(chunk.into()))).collect()
        });
        let request = request(&hop.context, tokens)?;
        let mut client = self.client.clone();
        streaming(hop, client.decode(request), DecodeEvent::try_from).await
    }
}
