//! How much the server accepts. Each limit is a flag; what goes beyond it is refused with a message
//! that names the flag, and counted under the flag's name.

use std::ops::RangeInclusive;
use std::time::Duration;

use clap::Args;
use inflight_stats::config::parse_duration;
use inflight_stats::protocol::frame::FrameLimits;
use inflight_stats::protocol::report::MAX_BYTES;

/// Declares each limit once: help, field, flag, default, range, and the name under which what goes
/// beyond it is counted.
macro_rules! limits {
    ($(
        $(#[doc = $help:literal])+
        $field:ident $flag:literal: $type:ty = $default:expr, $range:expr $(=> $limit:ident)?;
    )*) => {
        /// The limits.
        #[derive(Clone, Copy, Debug, Args)]
        #[command(next_help_heading = "Limits")]
        pub struct Limits {
            $(
                $(#[doc = $help])+
                #[arg(
                    long = $flag,
                    default_value = <$type as Value>::text($default),
                    value_parser = <$type as Value>::parser($range),
                    value_name = <$type as Value>::NAME,
                )]
                pub $field: $type,
            )*
        }

        /// A limit, by its flag.
        #[derive(Clone, Copy, Debug, PartialEq, Eq)]
        #[allow(missing_docs, reason = "the flags' own names")]
        pub enum Limit {
            $($($limit,)?)*
        }

        impl Limit {
            /// All that are counted.
            pub const ALL: &[Self] = &[$($(Self::$limit,)?)*];

            /// Returns the flag, without its dashes.
            pub fn flag(self) -> &'static str {
                match self {
                    $($(Self::$limit => $flag,)?)*
                }
            }
        }
    };
}

const MIB: usize = 1 << 20;
const GIB: usize = 1 << 30;
/// How long anything may be waited for.
const TIMEOUT: RangeInclusive<Duration> = Duration::from_millis(100)..=Duration::from_secs(600);

const fn seconds(seconds: u64) -> Duration {
    Duration::from_secs(seconds)
}

limits! {
    /// Maximum number of concurrent HTTP connections, websockets included; one more closes the one
    /// that has been idle for longest.
    max_connections "max-connections": usize = 3_000, 1..=1_000_000 => Connections;

    /// Maximum number of concurrent gRPC connections; KEDA opens one per scaler address.
    max_grpc_connections "max-grpc-connections": usize = 32, 1..=1_000_000 => GrpcConnections;

    /// Maximum number of concurrent connections that have not authenticated yet; one more replaces
    /// the oldest.
    max_unauthenticated_connections "max-unauthenticated-connections": usize = 500, 1..=1_000_000
        => UnauthenticatedConnections;

    /// Maximum number of bytes of bodies, frames and messages being received at once, over all
    /// connections; the first 4 KiB of each are free.
    max_bytes_in_flight "max-bytes-in-flight": usize = 16 * MIB, MIB..=4 * GIB - 1 => BytesInFlight;

    /// Maximum number of bytes of answers that clients have yet to read, over all connections; the
    /// first 4 KiB of each are free.
    max_answer_bytes "max-answer-bytes": usize = 12 * MIB, MIB..=4 * GIB - 1 => AnswerBytes;

    /// Largest request head, in bytes.
    max_head_bytes "max-head-bytes": usize = 8_192, 8_192..=MIB => HeadBytes;

    /// How long a TLS handshake, and then a request's head, may take.
    head_timeout "head-timeout": Duration = seconds(10), TIMEOUT => HeadTimeout;

    /// How long a request's body, a frame of the stat stream or the message of a gRPC call may
    /// take.
    body_timeout "body-timeout": Duration = seconds(10), TIMEOUT => BodyTimeout;

    /// How long an HTTP connection may be idle between two requests; keep it above the longest
    /// reporting period.
    idle_timeout "idle-timeout": Duration = seconds(75), TIMEOUT;

    /// How long a client may take to read what is written to it.
    write_timeout "write-timeout": Duration = seconds(20), TIMEOUT => WriteTimeout;

    /// Largest report, in bytes.
    max_report_bytes "max-report-bytes": usize = MAX_BYTES, 1_024..=MAX_BYTES => ReportBytes;

    /// Largest frame of the stat stream, in bytes.
    max_frame_bytes "max-frame-bytes": usize = MIB, 1_024..=64 * MIB => FrameBytes;

    /// Largest settings of a key as JSON, in bytes.
    max_settings_bytes "max-settings-bytes": usize = 16_384, 256..=MIB => SettingsBytes;

    /// Largest message of a gRPC call, in bytes.
    max_grpc_bytes "max-grpc-bytes": usize = 8_192, 1_024..=4 * MIB => GrpcBytes;

    /// Maximum number of concurrent gRPC streams, over all connections; KEDA keeps two open for
    /// each ScaledObject.
    max_grpc_streams "max-grpc-streams": usize = 2_000, 1..=1_000_000 => GrpcStreams;

    /// Maximum number of keys in a report, and of stats in a frame of the stream.
    max_messages "max-messages": usize = 10_000, 1..=1_000_000 => Messages;

    /// Deepest nesting of values, in settings and in gob streams.
    max_depth "max-depth": usize = 16, 1..=64 => Depth;

    /// Maximum number of keys.
    max_keys "max-keys": usize = 100_000, 1..=10_000_000 => Keys;

    /// Maximum number of keys in one namespace.
    max_keys_per_namespace "max-keys-per-namespace": usize = 10_000, 1..=1_000_000 => KeysPerNamespace;

    /// Maximum number of pods and gateways that report one key.
    max_pods_per_key "max-pods-per-key": usize = 20_000, 1..=1_000_000 => PodsPerKey;

    /// Maximum number of bytes that all keys, their windows and their senders take.
    max_table_bytes "max-table-bytes": usize = 224 * MIB, MIB..=1024 * GIB => TableBytes;
}

impl Limits {
    /// Returns the limits of a frame of the stat stream.
    pub fn frame_limits(&self) -> FrameLimits {
        FrameLimits { bytes: self.max_frame_bytes, messages: self.max_messages, depth: self.max_depth }
    }
}

/// Returns a bound as messages have it: in minutes if it is more than one, as in all messages.
fn in_words(duration: Duration) -> String {
    match duration.as_secs() {
        seconds if seconds > 60 && seconds % 60 == 0 => format!("{}m", seconds / 60),
        _ => format!("{duration:?}"),
    }
}

/// A limit's type, as the command line has it.
trait Value: Sized {
    /// What it is called in `--help`.
    const NAME: &str;

    /// Returns a value as it is written.
    fn text(self) -> String;

    /// Returns a parser of values within a range.
    fn parser(range: RangeInclusive<Self>) -> impl Fn(&str) -> Result<Self, String> + Clone;
}

impl Value for usize {
    const NAME: &str = "NUMBER";

    fn text(self) -> String {
        self.to_string()
    }

    fn parser(range: RangeInclusive<Self>) -> impl Fn(&str) -> Result<Self, String> + Clone {
        move |text| {
            let number = text.parse().ok().filter(|number| range.contains(number));
            number.ok_or_else(|| format!("expected a whole number from {} to {}", range.start(), range.end()))
        }
    }
}

impl Value for Duration {
    const NAME: &str = "DURATION";

    fn text(self) -> String {
        format!("{self:?}")
    }

    fn parser(range: RangeInclusive<Self>) -> impl Fn(&str) -> Result<Self, String> + Clone {
        move |text| {
            let duration = parse_duration(text).filter(|duration| range.contains(duration));
            duration.ok_or_else(|| {
                let (min, max) = (in_words(*range.start()), in_words(*range.end()));
                format!(
                    "expected a duration from {min} to {max}, such as \"1s\" or \"250ms\"; units ms, s, m"
                )
            })
        }
    }
}
