//! `InferenceService` and `ClusterService` over their traits.

use std::sync::Arc;

use longshore_proto::{
    types::{GenerateStart, PromptChunk},
    v1::{self, cluster_service_server::ClusterService, inference_service_server::InferenceService},
};
use tokio::sync::mpsc;
use tonic::{Request, Response, Status, Streaming};

use super::{
    Answers, answer,
    call::Desk,
    pump::{self, Step},
};
use crate::{Describer, Error, Inference};

/// Serves `inference`.
#[derive(Debug)]
pub(super) struct InferenceFront {
    pub(super) inference: Arc<dyn Inference>,
    pub(super) desk: Desk,
}

#[tonic::async_trait]
impl InferenceService for InferenceFront {
    type GenerateStream = Answers<v1::GenerateResponse>;

    async fn generate(
        &self,
        request: Request<Streaming<v1::GenerateRequest>>,
    ) -> Result<Response<Self::GenerateStream>, Status> {
        let hop = self.desk.enter(&request)?;
        let mut incoming = request.into_inner();
        let first = pump::first(&hop, &mut incoming).await?;
        let start = first.start.ok_or_else(pump::start_missing)?;
        let start = GenerateStart::try_from(start).map_err(|fault| Error::from(fault.within("start")))?;
        let (sender, prompt) = mpsc::channel(pump::QUEUE);
        if let Some(chunk) = first.chunk {
            let chunk = PromptChunk::try_from(chunk).map_err(Error::from)?;
            sender.try_send(chunk).expect("the channel is new and has room");
        }
        let pump = pump::pump(incoming, sender, None, prompt_step);
        let context = hop.context.clone();
        Ok(answer(pump::converse(hop, pump, self.inference.generate(&context, start, prompt)).await?))
    }

    async fn tokenize(
        &self,
        request: Request<v1::TokenizeRequest>,
    ) -> Result<Response<v1::TokenizeResponse>, Status> {
        let hop = self.desk.enter(&request)?;
        let v1::TokenizeRequest { model, text, skip_special_tokens } = request.into_inner();
        let call = self.inference.tokenize(&hop.context, &model, &text, skip_special_tokens);
        let token_ids = hop.answer(call).await?;
        Ok(Response::new(v1::TokenizeResponse { token_ids }))
    }

    async fn list_models(
        &self,
        request: Request<v1::ListModelsRequest>,
    ) -> Result<Response<v1::ListModelsResponse>, Status> {
        let hop = self.desk.enter(&request)?;
        let models = hop.answer(self.inference.list_models(&hop.context)).await?;
        Ok(Response::new(models.into()))
    }
}

fn prompt_step<A>(message: v1::GenerateRequest) -> Result<Step<PromptChunk, A>, Error> {
    if message.start.is_some() {
        return Err(pump::start_repeated());
    }
    match message.chunk {
        Some(chunk) => Ok(Step::Forward(PromptChunk::try_from(chunk)?)),
        None => Ok(Step::Skip),
    }
}

/// Serves `describer`.
#[derive(Debug)]
pub(super) struct ClusterFront {
    pub(super) describer: Arc<dyn Describer>,
    pub(super) desk: Desk,
}

#[tonic::async_trait]
impl ClusterService for ClusterFront {
    async fn describe(
        &self,
        request: Request<v1::DescribeRequest>,
    ) -> Result<Response<v1::DescribeResponse>, Status> {
        let hop = self.desk.enter(&request)?;
        let describe = hop.answer(self.describer.describe(&hop.context)).await?;
        Ok(Response::new(describe.into()))
    }
}
