//! `PrefillService` and `DecodeService` over their traits.

use std::sync::Arc;

use longshore_proto::{
    types::{DecodeStart, PrefillStart},
    v1::{
        self, decode_request, decode_service_server::DecodeService, prefill_request,
        prefill_service_server::PrefillService,
    },
};
use tokio::sync::mpsc;
use tonic::{Request, Response, Status, Streaming};

use super::{
    Answers, answer,
    call::Desk,
    pump::{self, Step},
};
use crate::{Decoder, Error, Prefiller};

/// Serves `prefiller`.
#[derive(Debug)]
pub(super) struct PrefillerService {
    pub(super) prefiller: Arc<dyn Prefiller>,
    pub(super) desk: Desk,
}

#[tonic::async_trait]
impl PrefillService for PrefillerService {
    type PrefillStream = Answers<v1::PrefillResponse>;

    async fn prefill(
        &self,
        request: Request<Streaming<v1::PrefillRequest>>,
    ) -> Result<Response<Self::PrefillStream>, Status> {
        let hop = self.desk.enter(&request)?;
        let mut incoming = request.into_inner();
        let Some(prefill_request::Part::Start(start)) = pump::first(&hop, &mut incoming).await?.part else {
            return Err(pump::start_missing().into());
        };
        let start = PrefillStart::try_from(start).map_err(|fault| Error::from(fault.within("start")))?;
        let (sender, tokens) = mpsc::channel(pump::QUEUE);
        let pump = pump::pump(incoming, sender, None, |message: v1::PrefillRequest| match message.part {
            Some(prefill_request::Part::Tokens(tokens)) => token_step(tokens),
            Some(prefill_request::Part::Start(_)) => Err(pump::start_repeated()),
            None => Err(Error::invalid("part", "is not set")),
        });
        let context = hop.context.clone();
        Ok(answer(pump::converse(hop, pump, self.prefiller.prefill(&context, start, tokens)).await?))
    }
}

/// Serves `decoder`.
#[derive(Debug)]
pub(super) struct DecoderService {
    pub(super) decoder: Arc<dyn Decoder>,
    pub(super) desk: Desk,
}

#[tonic::async_trait]
impl DecodeService for DecoderService {
    type DecodeStream = Answers<v1::DecodeResponse>;

    async fn decode(
        &self,
        request: Request<Streaming<v1::DecodeRequest>>,
    ) -> Result<Response<Self::DecodeStream>, Status> {
        let hop = self.desk.enter(&request)?;
        let mut incoming = request.into_inner();
        let Some(decode_request::Part::Start(start)) = pump::first(&hop, &mut incoming).await?.part else {
            return Err(pump::start_missing().into());
        };
        let start = DecodeStart::try_from(start).map_err(|fault| Error::from(fault.within("start")))?;
        let (sender, tokens) = mpsc::channel(pump::QUEUE);
        let pump = pump::pump(incoming, sender, None, |message: v1::DecodeRequest| match message.part {
            Some(decode_request::Part::Tokens(tokens)) => token_step(tokens),
            Some(decode_request::Part::Start(_)) => Err(pump::start_repeated()),
            None => Err(Error::invalid("part", "is not set")),
        });
        let context = hop.context.clone();
        Ok(answer(pump::converse(hop, pump, self.decoder.decode(&context, start, tokens)).await?))
    }
}

fn token_step<A>(tokens: v1::TokenChunk) -> Result<Step<Vec<u32>, A>, Error> {
    let tokens = Vec::<u32>::try_from(tokens).map_err(|fault| fault.within("tokens"))?;
    Ok(if tokens.is_empty() { Step::Skip } else { Step::Forward(tokens) })
}
