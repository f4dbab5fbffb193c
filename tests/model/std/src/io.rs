//! What is written to stderr is kept, to be looked at.

use ::std::cell::RefCell;
pub use ::std::io::*;
pub trait IsTerminal {
    fn is_terminal(&self) -> bool;
}
use ::std::mem::take;

thread_local! {
    static WRITTEN: RefCell<Vec<u8>> = RefCell::default();
}

pub struct Stderr;

pub fn stderr() -> Stderr {
    Stderr
}

impl IsTerminal for Stderr {
    fn is_terminal(&self) -> bool {
        false
    }
}

impl Write for Stderr {
    fn write(&mut self, bytes: &[u8]) -> Result<usize> {
        WRITTEN.with_borrow_mut(|written| written.extend_from_slice(bytes));
        Ok(bytes.len())
    }

    fn flush(&mut self) -> Result<()> {
        Ok(())
    }
}

/// The lines that were written since the last call.
pub fn take_lines() -> Vec<String> {
    let written = WRITTEN.with_borrow_mut(take);
    String::from_utf8_lossy(&written).lines().map(String::from).collect()
}
