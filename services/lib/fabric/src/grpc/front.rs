//! [`Inference`] and [`Describer`] over their services.

use async_trait::async_trait;
use longshore_proto::{
    types::{Describe, GenerateEvent, GenerateStart, ModelDescription, PromptChunk},
    v1::{
        self, cluster_service_client::ClusterServiceClient, inference_service_client::InferenceServiceClient,
    },
};
use tokio::sync::mpsc;
use tonic::transport::Channel;

use super::call::{messages, request, streaming, text_pieces, token_chunks, unary};
use crate::{BoxStream, CallContext, Describer, Error, Inference, lane::Hop};

/// Text of one prompt message; well below the server's 4 MiB.
const TEXT_BYTES_MAX: usize = 512 << 10;

/// A router behind an address.
#[derive(Debug)]
pub(super) struct InferenceClient {
    client: InferenceServiceClient<Channel>,
}

impl InferenceClient {
    pub(super) fn new(channel: Channel, message_bytes_max: usize) -> Self {
        let client = InferenceServiceClient::new(channel)
            .max_decoding_message_size(message_bytes_max)
            .max_encoding_message_size(message_bytes_max);
        Self { client }
    }
}

/// The messages that carry one piece of a prompt, each below 1 MiB; only a message of a conversation cannot be cut.
fn prompt_messages(chunk: PromptChunk) -> Vec<v1::GenerateRequest> {
    let pieces = match chunk {
        PromptChunk::Text(text) => {
            text_pieces(text, TEXT_BYTES_MAX).into_iter().map(PromptChunk::Text).collect()
        }
        PromptChunk::Tokens(tokens) => token_chunks(tokens).into_iter().map(PromptChunk::Tokens).collect(),
        message @ PromptChunk::Message(_) => vec![message],
    };
    let message = |piece: PromptChunk| v1::GenerateRequest { start: None, chunk: Some(piece.into()) };
    pieces.into_iter().map(message).collect()
}

#[async_trait]
impl Inference for InferenceClient {
    async fn generate(
        &self,
        ctx: &CallContext,
        start: GenerateStart,
        prompt: mpsc::Receiver<PromptChunk>,
    ) -> Result<BoxStream<GenerateEvent>, Error> {
        let hop = Hop::new(ctx);
        let start = v1::GenerateRequest { start: Some(start.into()), chunk: None };
        let prompt = messages(&hop.context, Some(start), prompt, prompt_messages);
        let request = request(&hop.context, prompt)?;
        let mut client = self.client.clone();
        streaming(hop, client.generate(request), GenerateEvent::try_from).await
    }

    async fn tokenize(
        &self,
        ctx: &CallContext,
        model: &str,
        text: &str,
        skip_special_tokens: bool,
    ) -> Result<Vec<u32>, Error> {
        let message =
            v1::TokenizeRequest { model: model.to_owned(), text: text.to_owned(), skip_special_tokens };
        let request = request(ctx, message)?;
        let mut client = self.client.clone();
        Ok(unary(ctx, client.tokenize(request)).await?.token_ids)
    }

    async fn list_models(&self, ctx: &CallContext) -> Result<Vec<ModelDescription>, Error> {
        let request = request(ctx, v1::ListModelsRequest {})?;
        let mut client = self.client.clone();
        let answer = unary(ctx, client.list_models(request)).await?;
        Vec::try_from(answer).map_err(|fault| Error::bad_answer(&fault))
    }
}

/// A process behind an address.
#[derive(Debug)]
pub(super) struct DescriberClient {
    client: ClusterServiceClient<Channel>,
}

impl DescriberClient {
    pub(super) fn new(channel: Channel, message_bytes_max: usize) -> Self {
        let client = ClusterServiceClient::new(channel)
            .max_decoding_message_size(message_bytes_max)
            .max_encoding_message_size(message_bytes_max);
        Self { client }
    }
}

#[async_trait]
impl Describer for DescriberClient {
    async fn describe(&self, ctx: &CallContext) -> Result<Describe, Error> {
        let request = request(ctx, v1::DescribeRequest {})?;
        let mut client = self.client.clone();
        let answer = unary(ctx, client.describe(request)).await?;
        Describe::try_from(answer).map_err(|fault| Error::bad_answer(&fault))
    }
}
