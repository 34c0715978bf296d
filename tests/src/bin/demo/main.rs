//! The demo, on this machine alone: `counting` compares what Envoy reports with its access log,
//! `scaling` takes a workload from no pods to some and back.

mod counting;
mod kubelet;
mod picture;
mod scaling;
mod waves;

use std::path::PathBuf;
use std::process::ExitCode;

use clap::Parser;
use tokio::signal::unix::{SignalKind, signal};

/// Inflight at work, on this machine alone.
#[derive(Parser)]
struct Options {
    /// Seconds to run; without it, until Ctrl-C.
    #[arg(long)]
    duration: Option<u64>,
    /// Envoy's worker threads.
    #[arg(long, default_value_t = 2)]
    concurrency: u32,
    /// Takes a picture of the live page at the end; that takes a Chromium.
    #[arg(long, value_name = "FILE")]
    screenshot: Option<PathBuf>,
    /// Shows a workload that goes from no pods to some and back, instead of one with a single pod.
    #[arg(long, conflicts_with_all = ["duration", "screenshot"])]
    scale: bool,
    /// Draws what that showed into an SVG file.
    #[arg(long, value_name = "FILE", requires = "scale")]
    picture: Option<PathBuf>,
}

/// Waits for Ctrl-C or SIGTERM.
async fn interrupted() {
    let (Ok(mut interrupt), Ok(mut terminate)) =
        (signal(SignalKind::interrupt()), signal(SignalKind::terminate()))
    else {
        return;
    };
    tokio::select! {
        _ = interrupt.recv() => {}
        _ = terminate.recv() => {}
    }
}

#[tokio::main]
async fn main() -> ExitCode {
    let Options { duration, concurrency, screenshot, scale, picture } = Options::parse();
    if !scale {
        return counting::run(duration, concurrency, screenshot.as_deref()).await;
    }
    // Whatever was started ends when its value is dropped.
    tokio::select! {
        code = scaling::run(concurrency, picture.as_deref()) => code,
        () = interrupted() => ExitCode::FAILURE,
    }
}
