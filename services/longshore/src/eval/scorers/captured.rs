//! Queries, keys and values of a model that reads a text with exact attention.

use anyhow::{Context, Result, ensure};
use longshore_attention::{HeadShape, PrefillPolicy, QUERY_TILE, Tiles};
use longshore_engine::{AttentionProbe, Logits};

use super::layer::{Layer, QueryTile};
use crate::{
    console,
    eval::{candidate::Candidate, subject::Subject, watch::Watch},
};

/// Visits every block, so that everything is exact, and lets itself be watched, which `exact` does not.
const EVERYTHING: &str = "blocks:alpha=0,correction=off,dense_layers=0,min_positions=0,last_tiles=0";

/// Reads the numbers of layers; refuses those that the model does not have.
pub(super) fn parse(texts: &[String], layers: usize) -> Result<Vec<usize>> {
    if texts.iter().any(|text| text == "all") {
        ensure!(texts.len() == 1, "`--layers` has `all` beside others, must be `all` or numbers");
        return Ok((0..layers).collect());
    }
    let read = |text: &String| {
        let number = text.parse().ok().filter(|layer| *layer < layers);
        number.with_context(|| {
            format!(
                "`--layers` has `{text}`, must be `all` or numbers from 0 to {}",
                layers.saturating_sub(1)
            )
        })
    };
    let mut found = texts.iter().map(read).collect::<Result<Vec<_>>>()?;
    found.sort_unstable();
    found.dedup();
    Ok(found)
}

/// One layer under way.
struct Taken {
    layer: usize,
    heads: HeadShape,
    scale: f32,
    kv: Option<Tiles>,
    tiles: Vec<QueryTile>,
}

/// Reads `tokens`, and takes the query tiles at these positions and all keys and values of the layers.
pub(super) fn layers(
    subject: &Subject,
    tokens: &[u32],
    layers: &[usize],
    first_positions: &[u64],
) -> Result<Vec<Layer>> {
    let policy = PrefillPolicy::parse(EVERYTHING, None).context("a policy that visits everything")?;
    let candidate = Candidate { name: "exact".to_owned(), policy: policy.into() };
    let heads = subject.node.info.config.heads;
    let empty = |&layer: &usize| Taken {
        layer,
        heads: HeadShape { kv_heads: heads.kv_heads, group: heads.group, head_dim: heads.head_dim },
        scale: 0.0,
        kv: None,
        tiles: Vec::new(),
    };
    let mut taken: Vec<Taken> = layers.iter().map(empty).collect();
    let end = tokens.len() as u64;
    let mut look = |probe: &AttentionProbe<'_>| {
        if let Some(taken) = taken.iter_mut().find(|taken| taken.layer == probe.layer) {
            taken.look(probe, first_positions, end);
        }
    };
    let bar = console::token_bar("reading", end);
    let mut watch = Watch::looking(&mut look).telling(&bar, subject.layers());
    // All logits: the last layer attends only for rows whose logits are wanted.
    subject.prefill(tokens, &candidate, &|_| Logits::All, &mut |_, _| Ok(()), &mut watch)?;
    drop(watch);
    bar.finish_and_clear();
    taken.into_iter().map(|taken| taken.finish(tokens.len())).collect()
}

impl Taken {
    fn look(&mut self, probe: &AttentionProbe<'_>, first_positions: &[u64], end: u64) {
        let queries = &probe.plan.queries;
        (self.heads, self.scale) = (queries.shape, queries.scale);
        let width = queries.shape.query_heads() * queries.shape.head_dim;
        let (first, rows) = (queries.first_position, queries.rows() as u64);
        for &at in first_positions.iter().filter(|at| (first..first + rows).contains(*at)) {
            let from = (at - first) as usize * width;
            if let Some(data) = queries.data.get(from..from + QUERY_TILE * width) {
                self.tiles.push(QueryTile { first_position: at, data: data.to_vec() });
            }
        }
        if first + rows == end {
            let kv = probe.plan.kv;
            let blocks = end.div_ceil(kv.shape().block_tokens as u64) as usize;
            let tiles = (0..blocks).map(|block| kv.tile(block).clone()).collect();
            self.kv = Some(Tiles { shape: kv.shape(), tiles });
        }
    }

    fn finish(self, tokens: usize) -> Result<Layer> {
        let kv = self.kv.with_context(|| format!("layer {} was not computed", self.layer))?;
        Layer::new(format!("layer {}", self.layer), (self.heads, self.scale), kv, tokens, self.tiles)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn layers_are_read_or_refused_by_name() {
        let read = |texts: &[&str]| parse(&texts.iter().map(|&text| text.to_owned()).collect::<Vec<_>>(), 4);
        assert_eq!(read(&["3", "0", "3"]).unwrap(), [0, 3]);
        assert_eq!(read(&["all"]).unwrap(), [0, 1, 2, 3]);
        for bad in [&["4"][..], &["-1"], &["x"], &["all", "1"]] {
            let message = read(bad).unwrap_err().to_string();
            assert!(message.contains("`--layers`") && message.contains("`all`"), "{message}");
        }
    }
}
