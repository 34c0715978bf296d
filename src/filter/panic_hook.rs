//! The panic hook: what is saved when a VM panics.

/// Makes a panic call `seal` after it is logged. The hook runs before the VM stops, and host calls
/// work in it.
pub fn install(seal: impl Fn() + Send + Sync + 'static) {
    let log = std::panic::take_hook();
    std::panic::set_hook(Box::new(move |info| {
        log(info);
        seal();
    }));
}
