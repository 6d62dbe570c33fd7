//! What the process that started this one has decided about signals, and what this one does with those of a
//! terminal's job control. The libraries for signals only install handlers.

use std::{io, mem::MaybeUninit, ptr};

/// Whether `signal` is ignored. A signal that is ignored when a program starts is to stay so (POSIX, `nohup` and
/// the background commands of a shell without job control): ask before a handler is installed.
pub fn is_ignored(signal: i32) -> bool {
    let mut action = MaybeUninit::<libc::sigaction>::uninit();
    // SAFETY: no new action is given, and `action` has room for the one that is there; it is read only if the
    // call has succeeded, and has written it.
    unsafe {
        libc::sigaction(signal, ptr::null(), action.as_mut_ptr()) == 0
            && action.assume_init_ref().sa_sigaction == libc::SIG_IGN
    }
}

/// Keeps `signals` from this thread and those that it starts from now on.
pub fn block(signals: &[i32]) -> io::Result<()> {
    let mut set = MaybeUninit::<libc::sigset_t>::uninit();
    // SAFETY: `set` is initialised by `sigemptyset`, which cannot fail for a valid pointer, before anything else
    // looks at it; the old mask is not asked for.
    let error = unsafe {
        libc::sigemptyset(set.as_mut_ptr());
        for signal in signals {
            if libc::sigaddset(set.as_mut_ptr(), *signal) != 0 {
                return Err(io::Error::last_os_error());
            }
        }
        libc::pthread_sigmask(libc::SIG_BLOCK, set.as_ptr(), ptr::null_mut())
    };
    match error {
        0 => Ok(()),
        error => Err(io::Error::from_raw_os_error(error)),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_the_runtime_ignores_is_known_as_ignored() {
        // The runtime of Rust ignores SIGPIPE before `main`.
        assert!(is_ignored(libc::SIGPIPE));
        assert!(!is_ignored(libc::SIGWINCH));
    }

    #[test]
    fn a_signal_that_does_not_exist_is_an_error_or_not_ignored() {
        assert!(!is_ignored(100_000));
        assert!(block(&[100_000]).is_err());
        block(&[libc::SIGTTOU]).unwrap();
    }
}
