//! Common parts of the benchmarks: CPU time of a process, medians, pinning.

use std::process::Command;

/// Returns the CPU seconds that the threads of a process have used so far, to the nanosecond.
///
/// # Panics
/// If the process is gone.
pub fn cpu_seconds(pid: u32) -> f64 {
    let path = format!("/proc/{pid}/task");
    let threads = std::fs::read_dir(&path).unwrap_or_else(|e| panic!("{path}: {e}"));
    let nanoseconds = threads.flatten().map(|thread| {
        // A thread that has just ended has no statistics any more.
        let schedstat = std::fs::read_to_string(thread.path().join("schedstat")).unwrap_or_default();
        schedstat.split(' ').next().and_then(|ns| ns.parse::<u64>().ok()).unwrap_or(0)
    });
    nanoseconds.sum::<u64>() as f64 / 1e9
}

/// Returns the median of the values and their quartiles: (median, first, third).
///
/// # Panics
/// If there are no values.
pub fn spread(values: &[f64]) -> (f64, f64, f64) {
    (quantile(values, 0.5), quantile(values, 0.25), quantile(values, 0.75))
}

/// Returns the value below which a given share of the values lies.
///
/// # Panics
/// If there are no values.
pub fn quantile(values: &[f64], share: f64) -> f64 {
    let mut sorted = values.to_vec();
    sorted.sort_by(f64::total_cmp);
    sorted[((sorted.len() as f64 * share) as usize).min(sorted.len() - 1)]
}

/// Pins a process, with all its threads, to some cores.
///
/// # Panics
/// If there is no such core.
pub fn pin(pid: u32, cores: &str) {
    let done = Command::new("taskset").args(["-a", "-p", "-c", cores, &pid.to_string()]).output();
    let done = done.expect("taskset, of util-linux");
    assert!(done.status.success(), "{}", String::from_utf8_lossy(&done.stderr));
}

/// Returns a description of this machine: the processor, its cores, and the date.
pub fn machine() -> String {
    let read = |path| std::fs::read_to_string(path).unwrap_or_default();
    let info = read("/proc/cpuinfo");
    let model =
        info.lines().find_map(|line| line.strip_prefix("model name")).unwrap_or("an unknown processor");
    let cores = info.matches("processor\t").count();
    let date = Command::new("date")
        .arg("+%F")
        .output()
        .map(|o| String::from_utf8_lossy(&o.stdout).trim().to_owned());
    format!("{}, {cores} cores, {}", model.trim_start_matches(['\t', ' ', ':']), date.unwrap_or_default())
}

/// Formats rows as a Markdown table. The first row is the head.
pub fn table(rows: &[Vec<String>]) -> String {
    let mut text = String::new();
    for (number, row) in rows.iter().enumerate() {
        text.push_str(&format!("| {} |\n", row.join(" | ")));
        if number == 0 {
            text.push_str(&format!("|{}\n", "---|".repeat(row.len())));
        }
    }
    text
}
