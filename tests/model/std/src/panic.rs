//! Panics on purpose, and whose they are.

use ::std::any::Any;
use ::std::cell::RefCell;
use ::std::collections::HashSet;
pub use ::std::panic::{AssertUnwindSafe, UnwindSafe, resume_unwind};

thread_local! {
    /// The threads of the model that panic.
    static PANICKING: RefCell<HashSet<usize>> = RefCell::default();
}

fn me() -> usize {
    shuttle::thread::current().id().into()
}

/// Panics without the hook, which would take it for the end of the model. Each may be caught, also while others go on.
pub fn on_purpose() -> ! {
    PANICKING.with_borrow_mut(|threads| threads.insert(me()));
    resume_unwind(Box::new("on purpose"))
}

pub fn catch_unwind<T>(work: impl FnOnce() -> T + UnwindSafe) -> Result<T, Box<dyn Any + Send>> {
    ::std::panic::catch_unwind(work).inspect_err(|_| {
        let was_on_purpose = PANICKING.with_borrow_mut(|threads| threads.remove(&me()));
        assert!(was_on_purpose, "a panic that a room has caught: a fault");
    })
}

pub(crate) fn is_panicking() -> bool {
    ::std::thread::panicking() && PANICKING.with_borrow(|threads| threads.contains(&me()))
}
