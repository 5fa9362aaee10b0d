//! Frequencies against numbers computed apart from this code (NumPy in f64, from the papers' formulas, quoted above each table).

use super::*;

fn config(theta: f32, dim: usize, scaling: RopeScaling) -> RopeConfig {
    RopeConfig { style: RopeStyle::Interleaved, theta, dim, scaling }
}

#[track_caller]
fn check(rope: &Rope, expected: &[(usize, f64)]) {
    for &(i, want) in expected {
        let got = rope.frequencies()[i];
        assert!((got - want).abs() <= 1e-12 * want, "frequency {i} is {got:e}, must be {want:e}");
    }
}

/// RoPE (Su et al.): theta to the power of -2i/d.
#[test]
fn plain_frequencies_fall_geometrically() {
    let rope = Rope::new(&config(100_000.0, 64, RopeScaling::None)).unwrap();
    assert_eq!(rope.frequencies().len(), 32);
    check(
        &rope,
        &[(0, 1.0), (1, 0.6978305848598664), (16, 0.00316227766016838), (31, 1.4330125702369627e-05)],
    );
    assert_eq!(rope.magnitude(), 1.0);
}

/// Position interpolation (Chen et al.): every position divided by the factor.
#[test]
fn linear_scaling_divides_every_frequency() {
    let rope = Rope::new(&config(10_000.0, 64, RopeScaling::Linear { factor: 4.0 })).unwrap();
    check(&rope, &[(0, 0.25), (1, 0.18747355233311397), (16, 0.0025), (31, 3.33380358040831e-05)]);
}

/// NTK-aware scaling: the base times the factor to the power of d / (d - 2), so that the last pair is divided by the factor
/// and the first keeps its frequency.
#[test]
fn ntk_scaling_raises_the_base() {
    let rope = Rope::new(&config(10_000.0, 64, RopeScaling::Ntk { factor: 4.0 })).unwrap();
    check(
        &rope,
        &[
            (0, 1.0),
            (1, 0.7170983281048126),
            (12, 0.01849032392581585),
            (20, 0.0012929275784091781),
            (31, 3.3338035804083106e-05),
        ],
    );
}

/// Llama 3.1: wavelengths under context / high keep their frequency, over context / low they are divided by the factor, and
/// between them the two are mixed linearly in context / wavelength (pairs 29 to 34 here).
#[test]
fn llama3_scaling_mixes_by_wavelength() {
    let scaling = RopeScaling::Llama3 {
        factor: 8.0,
        low_freq_factor: 1.0,
        high_freq_factor: 4.0,
        original_context: 8192,
    };
    let rope = Rope::new(&config(500_000.0, 128, scaling)).unwrap();
    check(
        &rope,
        &[
            (0, 1.0),
            (1, 0.8146172338565447),
            (28, 0.0032114459947525913),
            (29, 0.002166570763503359),
            (30, 0.0013718935677611381),
            (32, 0.0005248461609929547),
            (35, 9.556212353964683e-05),
            (63, 3.068925988914511e-07),
        ],
    );
}

/// YaRN (Peng et al.): a ramp over the pairs between those that rotate beta_fast and beta_slow times within the training
/// context (23 and 40 here, rounded outwards) from the plain to the divided frequency; cosines and sines times
/// 0.1 ln(factor) + 1.
#[test]
fn yarn_scaling_ramps_between_the_betas() {
    let yarn = |attention_factor| RopeScaling::Yarn {
        factor: 4.0,
        original_context: 32768,
        attention_factor,
        beta_fast: 32.0,
        beta_slow: 1.0,
    };
    let rope = Rope::new(&config(1_000_000.0, 128, yarn(None))).unwrap();
    check(
        &rope,
        &[
            (0, 1.0),
            (23, 0.006978305848598663),
            (24, 0.005375321490790102),
            (30, 0.0010643609812470017),
            (39, 6.490394320837029e-05),
            (40, 4.445698525097307e-05),
            (63, 3.102344401879299e-07),
        ],
    );
    assert!((rope.magnitude() - 1.138629436111989).abs() < 1e-12);
    assert!((f64::from(rope.at(0).cos[5]) - 1.138629436111989).abs() < 1e-7);
    assert_eq!(Rope::new(&config(1e6, 128, yarn(Some(1.25)))).unwrap().magnitude(), 1.25);
}

#[test]
fn factors_divide_one_frequency_each() {
    let rope = Rope::new(&config(10_000.0, 4, RopeScaling::Factors(vec![1.0, 8.0]))).unwrap();
    check(&rope, &[(0, 1.0), (1, 0.01 / 8.0)]);
}

/// Values of a 50-digit computation: at three million an f32 angle would be off by a tenth of a radian.
#[test]
fn angles_stay_exact_at_millions() {
    let rotation = Rope::new(&config(100_000.0, 64, RopeScaling::None)).unwrap().at(3_000_001);
    for (i, cos, sin) in [
        (0, 0.997_359_063_374_195_2, -0.072_628_497_887_179_77),
        (1, -0.470_001_657_412_018_4, -0.882_665_532_367_700_2),
        (31, 0.547_095_639_601_628_5, -0.837_070_105_265_314_7),
    ] {
        assert!((f64::from(rotation.cos[i]) - cos).abs() < 1e-7, "cosine {i}: {}", rotation.cos[i]);
        assert!((f64::from(rotation.sin[i]) - sin).abs() < 1e-7, "sine {i}: {}", rotation.sin[i]);
    }
}

#[test]
fn styles_pair_elements_and_the_rest_passes_through() {
    // A base of e² makes the second pair turn by 1/e radians a position.
    let mut rope = config(std::f32::consts::E.powi(2), 4, RopeScaling::None);
    let (s0, c0) = 3.0_f32.sin_cos();
    let (s1, c1) = (3.0 / std::f32::consts::E).sin_cos();
    let head = [1.0, 2.0, 3.0, 4.0, 5.0];
    let turn = |rope: &RopeConfig| {
        let rope = Rope::new(rope).unwrap();
        let mut head = head;
        rope.rotate(&mut head, &rope.at(3));
        head
    };
    let close = |got: [f32; 5], want: [f32; 5]| {
        assert!(got.iter().zip(want).all(|(g, w)| (g - w).abs() < 1e-5), "{got:?} must be {want:?}");
        assert_eq!(got[4], 5.0);
    };
    close(turn(&rope), [c0 - 2.0 * s0, s0 + 2.0 * c0, 3.0 * c1 - 4.0 * s1, 3.0 * s1 + 4.0 * c1, 5.0]);
    rope.style = RopeStyle::Halves;
    close(turn(&rope), [c0 - 3.0 * s0, 2.0 * c1 - 4.0 * s1, s0 + 3.0 * c0, 2.0 * s1 + 4.0 * c1, 5.0]);
}

#[test]
fn impossible_constants_are_refused_by_name() {
    let yarn = |factor, original_context, attention_factor, beta_fast, beta_slow| RopeScaling::Yarn {
        factor,
        original_context,
        attention_factor,
        beta_fast,
        beta_slow,
    };
    let llama3 = |low, high, original_context| RopeScaling::Llama3 {
        factor: 8.0,
        low_freq_factor: low,
        high_freq_factor: high,
        original_context,
    };
    let cases = [
        (config(1e4, 0, RopeScaling::None), "rope.dim"),
        (config(1e4, 7, RopeScaling::None), "rope.dim"),
        (config(1e4, 2, RopeScaling::Ntk { factor: 2.0 }), "rope.dim"),
        (config(f32::NAN, 8, RopeScaling::None), "rope.theta"),
        (config(1.0, 8, RopeScaling::None), "rope.theta"),
        (config(1e4, 8, RopeScaling::Linear { factor: 0.0 }), "rope.scaling.factor"),
        (config(1e4, 8, RopeScaling::Ntk { factor: f32::INFINITY }), "rope.scaling.factor"),
        (config(1e4, 8, llama3(4.0, 4.0, 8192)), "rope.scaling.high_freq_factor"),
        (config(1e4, 8, llama3(1.0, 4.0, 0)), "rope.scaling.original_context"),
        (config(1e4, 8, yarn(f32::NAN, 4096, None, 32.0, 1.0)), "rope.scaling.factor"),
        (config(1e4, 8, yarn(4.0, 0, None, 32.0, 1.0)), "rope.scaling.original_context"),
        (config(1e4, 8, yarn(4.0, 4096, Some(0.0), 32.0, 1.0)), "rope.scaling.attention_factor"),
        (config(1e4, 8, yarn(4.0, 4096, None, 1.0, 32.0)), "rope.scaling.beta_fast"),
        (config(1e4, 8, RopeScaling::Factors(vec![1.0; 3])), "rope.scaling.factors"),
        (config(1e4, 8, RopeScaling::Factors(vec![1.0, 0.0, 1.0, 1.0])), "rope.scaling.factors"),
    ];
    for (config, field) in cases {
        let error = Rope::new(&config).unwrap_err().to_string();
        assert!(error.contains(&format!("`{field}`")), "{config:?}: {error}");
    }
}
