//! Request traces in Mooncake's format: one JSON object a line with `timestamp` (milliseconds), `input_length` and
//! `output_length` (tokens) and `hash_ids`, one id for each block of the prompt; equal ids mean an equal prefix up to and
//! including that block.

use std::{
    collections::HashMap,
    io::{BufRead, Read as _},
};

use serde_json::{Map, Value};

/// Longest line: a prompt of 2^28 tokens in blocks of 512 has half a million ids.
const LINE_BYTES_MAX: u64 = 8 << 20;
/// Most blocks of all prompts together.
const BLOCKS_MAX: usize = 1 << 28;
/// Parent of a prompt's first block.
const ROOT: u64 = u64::MAX;

/// One request.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Request {
    /// Milliseconds since the first one.
    pub(super) timestamp_ms: u64,
    /// Tokens of the prompt.
    pub(super) input_tokens: u64,
    /// Names of the blocks of the prompt.
    pub(super) blocks: Vec<u64>,
}

/// Requests, in the order of their arrival.
#[derive(Debug, Clone, Default)]
pub(super) struct Trace {
    pub(super) requests: Vec<Request>,
    /// Tokens of a block.
    pub(super) block_tokens: u64,
    /// Different blocks.
    pub(super) unique_blocks: u64,
    /// Blocks of all prompts.
    pub(super) blocks: u64,
    /// Tokens of all prompts.
    pub(super) tokens: u64,
}

/// Why a trace cannot be replayed.
#[derive(Debug, thiserror::Error)]
pub(super) enum TraceError {
    /// Reading failed.
    #[error("line {line}: cannot be read")]
    Io {
        /// From 1.
        line: u64,
        /// What the system says.
        source: std::io::Error,
    },
    /// A line does not end.
    #[error("line {line}: is longer than {limit} bytes; is this a trace of one request a line?")]
    TooLong {
        /// From 1.
        line: u64,
        /// Longest line.
        limit: u64,
    },
    /// A line is no JSON object.
    #[error("line {line}: is no JSON object: {problem}")]
    Json {
        /// From 1.
        line: u64,
        /// What the parser says.
        problem: String,
    },
    /// A field cannot be.
    #[error("line {line}: `{field}` {problem}")]
    Field {
        /// From 1.
        line: u64,
        /// Its name.
        field: &'static str,
        /// What is wrong, as a verb phrase.
        problem: String,
    },
    /// There is nothing to replay.
    #[error("the trace has no request")]
    Empty,
}

impl Trace {
    /// Reads a trace, one line in memory at a time. Empty lines are passed over.
    pub(super) fn read(mut source: impl BufRead, block_tokens: u64) -> Result<Self, TraceError> {
        let mut builder = Builder::new(block_tokens);
        let mut line = 0;
        let mut bytes = Vec::new();
        loop {
            line += 1;
            bytes.clear();
            let read = source.by_ref().take(LINE_BYTES_MAX + 1).read_until(b'\n', &mut bytes);
            if read.map_err(|source| TraceError::Io { line, source })? == 0 {
                return builder.finish();
            }
            if bytes.len() as u64 > LINE_BYTES_MAX {
                return Err(TraceError::TooLong { line, limit: LINE_BYTES_MAX });
            }
            if !bytes.trim_ascii().is_empty() {
                builder.push(line, parse(line, &bytes)?)?;
            }
        }
    }

    /// A trace of requests that were made up.
    pub(super) fn of(requests: Vec<Request>, block_tokens: u64) -> Result<Self, TraceError> {
        let mut builder = Builder::new(block_tokens);
        for (line, request) in (1..).zip(requests) {
            builder.push(line, request)?;
        }
        builder.finish()
    }
}

fn parse(line: u64, bytes: &[u8]) -> Result<Request, TraceError> {
    let object: Map<String, Value> = serde_json::from_slice(bytes)
        .map_err(|error| TraceError::Json { line, problem: error.to_string() })?;
    number(line, &object, "output_length")?;
    let ids = field(line, &object, "hash_ids")?;
    let wrong = |problem: String| TraceError::Field { line, field: "hash_ids", problem };
    let ids = ids.as_array().ok_or_else(|| wrong(format!("is {}, must be an array", kind(ids))))?;
    let id =
        |id: &Value| id.as_u64().ok_or_else(|| wrong(format!("has {}, must have whole numbers", kind(id))));
    Ok(Request {
        timestamp_ms: number(line, &object, "timestamp")?,
        input_tokens: number(line, &object, "input_length")?,
        blocks: ids.iter().map(id).collect::<Result<_, _>>()?,
    })
}

fn field<'a>(
    line: u64,
    object: &'a Map<String, Value>,
    field: &'static str,
) -> Result<&'a Value, TraceError> {
    object.get(field).ok_or_else(|| TraceError::Field { line, field, problem: "is missing".to_owned() })
}

fn number(line: u64, object: &Map<String, Value>, name: &'static str) -> Result<u64, TraceError> {
    let value = field(line, object, name)?;
    value.as_u64().ok_or_else(|| {
        let problem = format!("is {}, must be a whole number from 0", kind(value));
        TraceError::Field { line, field: name, problem }
    })
}

/// What a value is, in short: it may be megabytes.
fn kind(value: &Value) -> String {
    match value {
        Value::Null => "null".to_owned(),
        Value::Bool(_) => "a truth value".to_owned(),
        Value::Number(number) => format!("`{number}`"),
        Value::String(_) => "a string".to_owned(),
        Value::Array(_) => "an array".to_owned(),
        Value::Object(_) => "an object".to_owned(),
    }
}

/// A trace being read.
struct Builder {
    trace: Trace,
    /// The block before each block: blocks are named by their whole prefix, so there is one.
    parents: HashMap<u64, u64>,
}

impl Builder {
    fn new(block_tokens: u64) -> Self {
        Self { trace: Trace { block_tokens, ..Trace::default() }, parents: HashMap::new() }
    }

    fn push(&mut self, line: u64, request: Request) -> Result<(), TraceError> {
        let wrong = |field, problem: String| Err(TraceError::Field { line, field, problem });
        let trace = &mut self.trace;
        if let Some(last) = trace.requests.last()
            && request.timestamp_ms < last.timestamp_ms
        {
            let problem = format!("is {}, the line before has {}", request.timestamp_ms, last.timestamp_ms);
            return wrong("timestamp", problem);
        }
        let blocks = request.blocks.len() as u64;
        let needed = request.input_tokens.div_ceil(trace.block_tokens);
        if blocks != needed {
            let (tokens, size) = (request.input_tokens, trace.block_tokens);
            let problem =
                format!("has {blocks} ids; {tokens} tokens in blocks of {size} are {needed} blocks");
            return wrong("hash_ids", problem);
        }
        if trace.blocks + blocks > BLOCKS_MAX as u64 {
            return wrong(
                "hash_ids",
                format!("are more than {BLOCKS_MAX} so far, the most that is replayed"),
            );
        }
        let mut parent = ROOT;
        for &block in &request.blocks {
            let known = *self.parents.entry(block).or_insert(parent);
            if known != parent || block == ROOT {
                return wrong("hash_ids", format!("has `{block}` after another prefix than before"));
            }
            parent = block;
        }
        trace.blocks += blocks;
        trace.tokens = trace.tokens.saturating_add(request.input_tokens);
        trace.requests.push(request);
        Ok(())
    }

    fn finish(mut self) -> Result<Trace, TraceError> {
        if self.trace.blocks == 0 {
            return Err(TraceError::Empty);
        }
        self.trace.unique_blocks = self.parents.len() as u64;
        Ok(self.trace)
    }
}
