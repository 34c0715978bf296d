//! Values as Kubernetes' quantities.

use inflight_stats::scaling::answer::MAX_VALUE;

/// Returns a value as a quantity. Controllers count in thousandths and round up, and so does this:
/// whatever is above zero stays above zero.
pub fn quantity(value: f64) -> String {
    // Averages are rounded to six digits; the rest is what floating point adds to a thousand times
    // as much.
    let thousandths = (value.clamp(0.0, MAX_VALUE) * 1000.0 - 1e-6).ceil().max(0.0) as u64;
    match thousandths % 1000 {
        0 => (thousandths / 1000).to_string(),
        _ => format!("{thousandths}m"),
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use inflight_stats::protocol::stat::Stat;
    use inflight_stats::scaling::answer::Quantity;
    use inflight_stats::scaling::key::Key;
    use inflight_stats::scaling::settings::KeySettings;
    use inflight_stats::{KeyReport, Snapshot};
    use serde_json::json;

    use super::*;

    #[test]
    fn a_value_is_rounded_up_to_thousandths() {
        for (value, text) in [
            (0.0, "0"),
            (-0.0, "0"),
            (35.0, "35"),
            (12.5, "12500m"),
            (0.1 + 0.2, "300m"),
            (1e-6, "1m"),
            (2.333_333, "2334m"),
            (1e9, "1000000000"),
            (MAX_VALUE, "9000000000000000"),
            (f64::INFINITY, "9000000000000000"),
            (-5.0, "0"),
        ] {
            assert_eq!(quantity(value), text, "{value}");
        }
    }

    /// Returns a quantity in thousandths, as Kubernetes reads it; `None` if it would not, or would
    /// read an overflow.
    fn milli_value(text: &str) -> Option<i64> {
        let (digits, factor) = text.strip_suffix('m').map_or((text, 1000), |digits| (digits, 1));
        let is_number = !digits.is_empty() && digits.bytes().all(|byte| byte.is_ascii_digit());
        digits.parse::<i64>().ok().filter(|_| is_number)?.checked_mul(factor)
    }

    #[test]
    fn no_state_of_a_key_gives_a_value_that_scales_by_mistake() {
        let mut seed = 16_u64;
        let mut roll = |sides: u64| {
            seed = seed.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
            (seed >> 33) % sides
        };
        let extremes = [0, 1, 7, 1_000, u64::from(u32::MAX), 1 << 40, u64::MAX / 2, u64::MAX];
        let (mut key, mut now, mut answers, mut missing) = (Key::new(Arc::default()), 0, [0; 4], 0);
        let (mut zeros, mut largest) = (0, 0);
        for step in 0..1_000_000 {
            if step % 200 == 0 {
                let settings = json!({
                    "metric": (["concurrency", "rps"][roll(2) as usize]),
                    "target": ([0.01, 1.0, 70.0, 1e9][roll(4) as usize]),
                    "stable_window": (["6s", "60s"][roll(2) as usize]),
                    "max_scale_up_rate": ([1.1, 1000.0, 1e300][roll(3) as usize]),
                    "max_scale_down_rate": ([1.1, 2.0, 1e300][roll(3) as usize]),
                    "scale_down_delay": (["0s", "10s"][roll(2) as usize]),
                    "activation_scale": ([0, 1, 1_000_000][roll(3) as usize]),
                    "max_scale": ([0, 1_000_000][roll(2) as usize]),
                });
                let settings = KeySettings::default().with(settings, 200.0).unwrap();
                now = 1_700_000_000_000_000_000;
                key = Key::new(Arc::new(settings));
                if roll(2) == 0 {
                    key = key.after_start(now);
                }
            }
            now += [1_000_000, 300_000_000, 1_000_000_000, 2_500_000_000, 30_000_000_000][roll(5) as usize];
            let mut total = || extremes[roll(8) as usize];
            match total() % 5 {
                0 | 1 => {
                    let mut snapshot = || Snapshot {
                        as_of_ns: total(),
                        requests: total(),
                        proxied_requests: total(),
                        request_ns: u128::from(total()) * u128::from(total()),
                        proxied_request_ns: u128::from(total()) * u128::from(total()),
                        in_flight: total() as u32,
                        proxied_in_flight: total() as u32,
                    };
                    let (since, until) = (snapshot(), snapshot());
                    let (namespace, name) = ("ns".into(), "rev".into());
                    let report = KeyReport { namespace, name, from_gateway: total() % 2 == 0, since, until };
                    let _ = key.record(["a", "b", "c"][total() as usize % 3], total() % 3, &report, now);
                }
                2 => {
                    let mut number =
                        || [0.0, -0.0, -1.0, 1e-300, 0.1, 1e9, f64::NAN, f64::INFINITY][total() as usize % 8];
                    let stat = Stat {
                        average_concurrent_requests: number(),
                        average_proxied_concurrent_requests: number(),
                        request_count: number(),
                        proxied_request_count: number(),
                        ..Stat::default()
                    };
                    let _ = key.record_stat(["a", "activator"][total() as usize % 2], &stat, now);
                }
                3 => drop(key.decide(now)),
                _ => key.forget(now),
            }
            for ((index, asked), count) in Quantity::ALL.into_iter().enumerate().zip(&mut answers) {
                match key.answer(asked, now) {
                    Ok(value) => {
                        let text = quantity(value);
                        let milli =
                            milli_value(&text).unwrap_or_else(|| panic!("{asked:?}: {value} is {text}"));
                        assert!((0.0..=MAX_VALUE).contains(&value) && (value > 0.0) == (milli > 0));
                        let most = if index == 2 { 1_000_000_000 } else { MAX_VALUE as i64 * 1000 };
                        assert!((0..=most).contains(&milli), "{asked:?}: {value} is {text}");
                        *count += 1;
                        zeros += u32::from(milli == 0);
                        largest = largest.max(milli);
                    }
                    Err(_) => missing += 1,
                }
            }
            for pod in key.pods(now) {
                for value in [pod.concurrency, pod.requests_per_second, pod.in_flight] {
                    assert!(milli_value(&quantity(value)).is_some(), "{pod:?}");
                }
            }
        }
        println!("{answers:?} answers, {zeros} of them zero, {missing} missing, at most {largest} m");
        assert!(answers.into_iter().all(|count| count > 100_000) && missing > 100_000 && zeros > 1_000);
        assert!(largest > 1 << 50);
    }
}
