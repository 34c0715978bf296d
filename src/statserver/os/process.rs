//! What this process uses, as Linux says in `/proc`.

use std::fs;

/// Clock ticks in a second: a part of Linux's interface to programs, the same on all machines that
/// the server is built for.
const TICKS_PER_SECOND: f64 = 100.0;

/// What this process uses.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct ProcessFigures {
    /// User and system time.
    pub cpu_seconds: f64,
    /// Resident memory.
    pub resident_bytes: u64,
    /// Open file descriptors.
    pub open_files: u64,
    /// How many it may open.
    pub max_files: u64,
    /// Its start, as unix time.
    pub started_at_seconds: f64,
}

/// Reads them; `None` where there is no `/proc`.
pub fn figures() -> Option<ProcessFigures> {
    let read = |path: &str| fs::read_to_string(path).ok();
    let (stat, status) = (read("/proc/self/stat")?, read("/proc/self/status")?);
    let (cpu_ticks, start_ticks) = ticks(&stat)?;
    let kib: u64 = value(&status, "VmRSS:")?.trim_end_matches(" kB").parse().ok()?;
    let booted_at: f64 = value(&read("/proc/stat")?, "btime ")?.parse().ok()?;
    // Without the one that lists them.
    let open_files = (fs::read_dir("/proc/self/fd").ok()?.count() as u64).saturating_sub(1);
    let (max_files, _) = rlimit::getrlimit(rlimit::Resource::NOFILE).ok()?;
    Some(ProcessFigures {
        cpu_seconds: cpu_ticks as f64 / TICKS_PER_SECOND,
        resident_bytes: kib * 1024,
        open_files,
        max_files,
        started_at_seconds: booted_at + start_ticks as f64 / TICKS_PER_SECOND,
    })
}

/// Returns the ticks of CPU time in `/proc/self/stat`, and those from the machine's boot to the
/// process's start.
fn ticks(stat: &str) -> Option<(u64, u64)> {
    // The name, in parentheses, may contain anything. What follows begins with the third field.
    let fields: Vec<&str> = stat.rsplit_once(')')?.1.split_whitespace().collect();
    let field = |number: usize| fields.get(number - 3)?.parse::<u64>().ok();
    Some((field(14)? + field(15)?, field(22)?))
}

/// Returns what follows a name at the beginning of a line.
fn value<'a>(text: &'a str, name: &str) -> Option<&'a str> {
    text.lines().find_map(|line| line.strip_prefix(name)).map(str::trim)
}

#[cfg(test)]
mod tests {
    use std::hint::black_box;
    use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

    use super::*;

    #[test]
    fn a_name_with_parentheses_and_spaces_hides_no_field() {
        let rest = "S 1 2 3 4 -1 0 0 0 0 0 120 30 7 8 20 0 5 0 9000 1 2";
        assert_eq!(ticks(&format!("7 (a) b (c)) {rest}")), Some((150, 9000)));
        assert_eq!(ticks("7 (a) S 1"), None);
    }

    #[test]
    fn a_process_that_works_and_opens_files_uses_more() {
        let before = figures().unwrap();
        let files: Vec<fs::File> = (0..50).map(|_| fs::File::open("/proc/self/stat").unwrap()).collect();
        let memory = black_box(vec![1_u8; 256 << 20]);
        let began = Instant::now();
        let mut after = figures().unwrap();
        while after.cpu_seconds <= before.cpu_seconds && began.elapsed() < Duration::from_secs(30) {
            after = figures().unwrap();
        }
        assert!(after.cpu_seconds > before.cpu_seconds, "{before:?} {after:?}");
        // Other tests of this process open files and take memory meanwhile, and give them back.
        assert!(after.open_files >= before.open_files + 30, "{before:?} {after:?}");
        assert!(after.resident_bytes >= before.resident_bytes + (128 << 20), "{before:?} {after:?}");
        assert!(after.max_files >= after.open_files, "{after:?}");
        let age =
            SystemTime::now().duration_since(UNIX_EPOCH).unwrap().as_secs_f64() - after.started_at_seconds;
        assert!((-2.0..600.0).contains(&age), "{age}");
        drop((files, memory));
    }
}
