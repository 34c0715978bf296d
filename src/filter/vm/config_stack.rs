//! The configurations of one worker. While Envoy replaces a listener, the root contexts of the old
//! and of the new configuration exist side by side, for as long as old connections drain.

use inflight_stats::Config;
use inflight_stats::counting::time::nanoseconds;

/// The root contexts that use a worker, with their configurations, the newest last. The newest is
/// in effect.
#[derive(Default)]
pub struct ConfigStack(Vec<(u32, Config)>);

impl ConfigStack {
    /// Adds a root context, or changes its configuration. Its configuration is in effect now.
    pub fn join(&mut self, root: u32, config: &Config) {
        self.0.retain(|(other, _)| *other != root);
        self.0.push((root, config.clone()));
    }

    /// Removes a root context. If its configuration was in effect, returns the root context and the
    /// configuration that are in effect again: Envoy does not call a root context whose
    /// configuration comes back while the context still exists.
    pub fn leave(&mut self, root: u32) -> Option<(u32, Config)> {
        let before = self.0.last().map(|(newest, _)| *newest);
        self.0.retain(|(other, _)| *other != root);
        self.0.last().filter(|(newest, _)| before != Some(*newest)).cloned()
    }

    /// Returns whether the last root context has gone, and with it the worker's work.
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// Returns the shortest reporting period of all configurations, in nanoseconds.
    pub fn shortest_period_ns(&self) -> Option<u64> {
        self.0.iter().map(|(_, config)| period_ns(config)).min()
    }
}

/// Returns a configuration's reporting period in nanoseconds.
pub fn period_ns(config: &Config) -> u64 {
    nanoseconds(config.reporting_period)
}

#[cfg(test)]
mod tests {
    use inflight_stats::Identity;

    use super::*;

    fn config(period: &str) -> Config {
        let json =
            format!(r#"{{"namespace": "n", "revision": "r", "pod": "p", "reporting_period": "{period}"}}"#);
        Config::parse(json.as_bytes(), &Identity::default(), |_| None).unwrap()
    }

    #[test]
    fn the_newest_is_in_force_and_the_one_before_when_it_goes() {
        let mut configs = ConfigStack::default();
        configs.join(1, &config("3s"));
        configs.join(2, &config("1s"));
        configs.join(3, &config("2s"));
        assert_eq!(configs.shortest_period_ns(), Some(1_000_000_000));
        assert_eq!(configs.leave(2), None, "it was not in force");
        assert_eq!(configs.leave(3), Some((1, config("3s"))));
        assert_eq!(configs.shortest_period_ns(), Some(3_000_000_000));
        assert_eq!(configs.leave(1), None);
        assert!(configs.is_empty());
        assert_eq!(configs.shortest_period_ns(), None);
    }

    #[test]
    fn a_root_context_has_one_configuration() {
        let mut configs = ConfigStack::default();
        configs.join(1, &config("1s"));
        configs.join(2, &config("2s"));
        configs.join(1, &config("3s"));
        assert_eq!(configs.shortest_period_ns(), Some(2_000_000_000));
        assert_eq!(configs.leave(1), Some((2, config("2s"))));
    }
}
