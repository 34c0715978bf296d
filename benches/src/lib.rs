//! The benchmarks' common parts: CPU time of a process, medians, pinning.

use std::process::Command;

/// CPU seconds that the threads of a process have used so far, to the nanosecond.
///
/// # Panics
/// If the process is gone.
pub fn cpu_seconds(pid: u32) -> f64 {
    let path = format!("/proc/{pid}/task");
    let threads = std::fs::read_dir(&path).unwrap_or_else(|e| panic!("{path}: {e}"));
    let nanoseconds = threads.flatten().map(|thread| {
        // A thread that has just ended is no longer to be asked.
        let schedstat = std::fs::read_to_string(thread.path().join("schedstat")).unwrap_or_default();
        schedstat.split(' ').next().and_then(|ns| ns.parse::<u64>().ok()).unwrap_or(0)
    });
    nanoseconds.sum::<u64>() as f64 / 1e9
}

/// The middle of the values, and the quartiles around it: (median, first, third).
///
/// # Panics
/// Without values.
pub fn spread(values: &[f64]) -> (f64, f64, f64) {
    (quantile(values, 0.5), quantile(values, 0.25), quantile(values, 0.75))
}

/// The value below which so large a share of the values lies.
///
/// # Panics
/// Without values.
pub fn quantile(values: &[f64], share: f64) -> f64 {
    let mut sorted = values.to_vec();
    sorted.sort_by(f64::total_cmp);
    sorted[((sorted.len() as f64 * share) as usize).min(sorted.len() - 1)]
}

/// Ties a process, with all its threads, to some cores.
///
/// # Panics
/// If there is no such core.
pub fn pin(pid: u32, cores: &str) {
    let done = Command::new("taskset").args(["-a", "-p", "-c", cores, &pid.to_string()]).output();
    let done = done.expect("taskset, of util-linux");
    assert!(done.status.success(), "{}", String::from_utf8_lossy(&done.stderr));
}

/// What this was measured on: the processor, its cores, the day.
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

/// Rows as a Markdown table, the first one its head.
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
