//! How much of everything is taken from a network. Each limit is a flag; what goes beyond it is refused with a word on which
//! one it was, and counted under the flag's name.

use std::time::Duration;

use clap::Args;
use inflight_stats::protocol::frame::FrameLimits;
use inflight_stats::protocol::report::MAX_BYTES;

/// The limits.
#[derive(Clone, Copy, Debug, Args)]
#[command(next_help_heading = "Limits")]
pub struct Limits {
    /// The most connections at once over HTTP, websockets among them.
    #[arg(long, env = "INFLIGHT_MAX_CONNECTIONS", default_value_t = 3_000, value_parser = up_to::<1, 1_000_000>)]
    pub max_connections: usize,

    /// The most connections at once over gRPC; KEDA has one for each address that it is told.
    #[arg(long, env = "INFLIGHT_MAX_GRPC_CONNECTIONS", default_value_t = 32, value_parser = up_to::<1, 1_000_000>)]
    pub max_grpc_connections: usize,

    /// The most connections at once over which nobody has shown a token or a certificate yet; one more takes the place of the oldest.
    #[arg(long, env = "INFLIGHT_MAX_STRANGERS", default_value_t = 500, value_parser = up_to::<1, 1_000_000>)]
    pub max_strangers: usize,

    /// The most bytes of bodies, frames and messages that are being received at once, over all connections; the first 4 KiB of
    /// each count nothing.
    #[arg(long, env = "INFLIGHT_MAX_BYTES_IN_FLIGHT", default_value_t = 16 << 20, value_parser = up_to::<{ 1 << 20 }, 4_294_967_295>)]
    pub max_bytes_in_flight: usize,

    /// The most bytes of answers that clients have yet to read, over all connections; the first 4 KiB of each count nothing.
    #[arg(long, env = "INFLIGHT_MAX_ANSWER_BYTES", default_value_t = 12 << 20, value_parser = up_to::<{ 1 << 20 }, 4_294_967_295>)]
    pub max_answer_bytes: usize,

    /// The largest head of a request in bytes.
    #[arg(long, env = "INFLIGHT_MAX_HEAD_BYTES", default_value_t = 8_192, value_parser = up_to::<8_192, 1_048_576>)]
    pub max_head_bytes: usize,

    /// How long a TLS handshake, and then a request's head, may take.
    #[arg(long, env = "INFLIGHT_HEAD_TIMEOUT", default_value = "10s", value_parser = timeout)]
    pub head_timeout: Duration,

    /// How long a request's body, a frame of the stat stream or the message of a gRPC call may take.
    #[arg(long, env = "INFLIGHT_BODY_TIMEOUT", default_value = "10s", value_parser = timeout)]
    pub body_timeout: Duration,

    /// How long an HTTP connection may be idle between two requests; longer than the longest reporting period.
    #[arg(long, env = "INFLIGHT_IDLE_TIMEOUT", default_value = "75s", value_parser = timeout)]
    pub idle_timeout: Duration,

    /// How long a client may take to read what is written to it.
    #[arg(long, env = "INFLIGHT_WRITE_TIMEOUT", default_value = "20s", value_parser = timeout)]
    pub write_timeout: Duration,

    /// The largest report in bytes.
    #[arg(long, env = "INFLIGHT_MAX_REPORT_BYTES", default_value_t = MAX_BYTES, value_parser = up_to::<1_024, MAX_BYTES>)]
    pub max_report_bytes: usize,

    /// The largest frame of the stat stream in bytes.
    #[arg(long, env = "INFLIGHT_MAX_FRAME_BYTES", default_value_t = 1_048_576, value_parser = up_to::<1_024, 67_108_864>)]
    pub max_frame_bytes: usize,

    /// The largest settings of a key, as JSON, in bytes.
    #[arg(long, env = "INFLIGHT_MAX_SETTINGS_BYTES", default_value_t = 16_384, value_parser = up_to::<256, 1_048_576>)]
    pub max_settings_bytes: usize,

    /// The largest message of a gRPC call in bytes.
    #[arg(long, env = "INFLIGHT_MAX_GRPC_BYTES", default_value_t = 8_192, value_parser = up_to::<1_024, 4_194_304>)]
    pub max_grpc_bytes: usize,

    /// The most gRPC calls at once, over all connections; KEDA has two open for each ScaledObject.
    #[arg(long, env = "INFLIGHT_MAX_GRPC_STREAMS", default_value_t = 2_000, value_parser = up_to::<1, 1_000_000>)]
    pub max_grpc_streams: usize,

    /// The most keys in a report, and stats in a frame of the stream.
    #[arg(long, env = "INFLIGHT_MAX_MESSAGES", default_value_t = 10_000, value_parser = up_to::<1, 1_000_000>)]
    pub max_messages: usize,

    /// How deep values may lie in each other, in settings and in a gob stream.
    #[arg(long, env = "INFLIGHT_MAX_DEPTH", default_value_t = 16, value_parser = up_to::<1, 64>)]
    pub max_depth: usize,

    /// The most keys in all.
    #[arg(long, env = "INFLIGHT_MAX_KEYS", default_value_t = 100_000, value_parser = up_to::<1, 10_000_000>)]
    pub max_keys: usize,

    /// The most keys of one namespace.
    #[arg(long, env = "INFLIGHT_MAX_KEYS_PER_NAMESPACE", default_value_t = 10_000, value_parser = up_to::<1, 1_000_000>)]
    pub max_keys_per_namespace: usize,

    /// The most pods and gateways that report one key.
    #[arg(long, env = "INFLIGHT_MAX_PODS_PER_KEY", default_value_t = 20_000, value_parser = up_to::<1, 1_000_000>)]
    pub max_pods_per_key: usize,

    /// The most bytes that all keys, their windows and those who report them take.
    #[arg(long, env = "INFLIGHT_MAX_TABLE_BYTES", default_value_t = 224 << 20, value_parser = up_to::<{ 1 << 20 }, { 1 << 40 }>)]
    pub max_table_bytes: usize,
}

impl Limits {
    /// Of a frame of the stat stream.
    pub fn of_frames(&self) -> FrameLimits {
        FrameLimits { bytes: self.max_frame_bytes, messages: self.max_messages, depth: self.max_depth }
    }
}

/// A limit, by its flag.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[allow(missing_docs, reason = "the flags' own names")]
pub enum Limit {
    Connections,
    GrpcConnections,
    Strangers,
    BytesInFlight,
    AnswerBytes,
    HeadBytes,
    HeadTimeout,
    BodyTimeout,
    WriteTimeout,
    ReportBytes,
    FrameBytes,
    SettingsBytes,
    GrpcBytes,
    GrpcStreams,
    Messages,
    Depth,
    Keys,
    KeysPerNamespace,
    PodsPerKey,
    TableBytes,
}

impl Limit {
    /// All that are counted.
    pub const ALL: [Self; 20] = [
        Self::Connections,
        Self::GrpcConnections,
        Self::Strangers,
        Self::BytesInFlight,
        Self::AnswerBytes,
        Self::HeadBytes,
        Self::HeadTimeout,
        Self::BodyTimeout,
        Self::WriteTimeout,
        Self::ReportBytes,
        Self::FrameBytes,
        Self::SettingsBytes,
        Self::GrpcBytes,
        Self::GrpcStreams,
        Self::Messages,
        Self::Depth,
        Self::Keys,
        Self::KeysPerNamespace,
        Self::PodsPerKey,
        Self::TableBytes,
    ];

    /// The flag, without its dashes.
    pub fn flag(self) -> &'static str {
        match self {
            Self::Connections => "max-connections",
            Self::GrpcConnections => "max-grpc-connections",
            Self::Strangers => "max-strangers",
            Self::BytesInFlight => "max-bytes-in-flight",
            Self::AnswerBytes => "max-answer-bytes",
            Self::HeadBytes => "max-head-bytes",
            Self::HeadTimeout => "head-timeout",
            Self::BodyTimeout => "body-timeout",
            Self::WriteTimeout => "write-timeout",
            Self::ReportBytes => "max-report-bytes",
            Self::FrameBytes => "max-frame-bytes",
            Self::SettingsBytes => "max-settings-bytes",
            Self::GrpcBytes => "max-grpc-bytes",
            Self::GrpcStreams => "max-grpc-streams",
            Self::Messages => "max-messages",
            Self::Depth => "max-depth",
            Self::Keys => "max-keys",
            Self::KeysPerNamespace => "max-keys-per-namespace",
            Self::PodsPerKey => "max-pods-per-key",
            Self::TableBytes => "max-table-bytes",
        }
    }
}

fn up_to<const LEAST: usize, const MOST: usize>(text: &str) -> Result<usize, String> {
    let number = text.parse().ok().filter(|number| (LEAST..=MOST).contains(number));
    number.ok_or_else(|| format!("allowed is a whole number from {LEAST} to {MOST}"))
}

fn timeout(text: &str) -> Result<Duration, String> {
    let (shortest, longest) = (Duration::from_millis(100), Duration::from_secs(600));
    let duration = inflight_stats::config::parse_duration(text).filter(|d| (shortest..=longest).contains(d));
    duration.ok_or_else(|| "allowed is 100ms to 10m".into())
}
