//! Blocks of random bytes against the values that the `gguf` package gives (`tests/extracts/generate.py`).

use serde_json::Value;

use super::*;

fn unhex(text: &Value) -> Vec<u8> {
    let text = text.as_str().unwrap();
    (0..text.len()).step_by(2).map(|at| u8::from_str_radix(&text[at..at + 2], 16).unwrap()).collect()
}

#[test]
fn every_block_type_agrees_with_the_reference() {
    let extract: Value =
        serde_json::from_str(include_str!("../../../tests/extracts/dequantize.json")).unwrap();
    for kind in TensorType::ALL {
        if kind == TensorType::F32 {
            continue;
        }
        let case = &extract[kind.name()];
        let bytes = unhex(&case["bytes"]);
        let expected: Vec<f32> =
            unhex(&case["values"]).chunks(4).map(|b| f32::from_le_bytes(b.try_into().unwrap())).collect();
        let mut values = vec![f32::NAN; expected.len()];
        assert!(dequantize(kind, &bytes, &mut values));
        for (index, (value, expected)) in values.iter().zip(&expected).enumerate() {
            // The reference rounds intermediate products in another order.
            let allowed = 1e-6 * (1.0 + expected.abs());
            assert!((value - expected).abs() <= allowed, "{} {index}: {value} {expected}", kind.name());
        }
    }
}

#[test]
fn long_tensors_are_their_blocks_one_after_another() {
    let data: Vec<f32> = (0..300_000).map(|i| i as f32 - 1.5).collect();
    let bytes: Vec<u8> = data.iter().flat_map(|x| x.to_le_bytes()).collect();
    let mut values = vec![0.0; data.len()];
    assert!(dequantize(TensorType::F32, &bytes, &mut values));
    assert_eq!(values, data);
    let blocks = 12_345;
    let bytes: Vec<u8> =
        (0..blocks * 34).map(|at| if at % 34 == 1 { 0x3c } else { (at % 7) as u8 }).collect();
    let mut values = vec![0.0; blocks * 32];
    assert!(dequantize(TensorType::Q8_0, &bytes, &mut values));
    for (block, values) in bytes.chunks(34).zip(values.chunks(32)) {
        let mut one = [0.0; 32];
        assert!(dequantize(TensorType::Q8_0, block, &mut one));
        assert_eq!(values, one);
    }
}

#[test]
fn numbers_that_are_not_finite_are_told() {
    for bad in [f32::NAN, f32::INFINITY, f32::NEG_INFINITY] {
        let bytes: Vec<u8> = [1.0, bad, 2.0f32].iter().flat_map(|x| x.to_le_bytes()).collect();
        assert!(!dequantize(TensorType::F32, &bytes, &mut [0.0; 3]), "{bad}");
    }
    let mut block = [1u8; 18];
    block[..2].copy_from_slice(&f16::INFINITY.to_le_bytes());
    assert!(!dequantize(TensorType::Q4_0, &block, &mut [0.0; 32]));
}
