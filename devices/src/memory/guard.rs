//! A file under a mapping that nobody can change or cut off while it is mapped.
//!
//! A page of a file that is cut off is a SIGBUS, and one that is written to shows the new bytes, also in a
//! private mapping. On Linux a read lease (fcntl(2), *Leases*) keeps both away: whoever opens the file for
//! writing or cuts it off has to wait until the lease is given back, for at most
//! `/proc/sys/fs/lease-break-time` (45 s by default), and its holder is told. It is given back when the mapping
//! is gone. Where there are no leases, nothing guards a mapping, and the bytes have to be copied.

pub(super) use sys::Guard;

/// Called when somebody waits to change the file.
type Hook = Box<dyn FnOnce() + Send>;

#[cfg(target_os = "linux")]
mod sys {
    use std::{
        fs::File,
        io,
        mem::MaybeUninit,
        os::{fd::AsRawFd, unix::thread::JoinHandleExt},
        ptr,
        sync::{
            Arc,
            atomic::{AtomicBool, Ordering},
            mpsc,
        },
        thread::{self, JoinHandle},
    };

    use parking_lot::Mutex;

    use super::Hook;

    /// Of include/uapi/asm-generic/fcntl.h.
    const F_SETOWN_EX: libc::c_int = 15;
    /// Of include/uapi/asm-generic/fcntl.h.
    const F_OWNER_TID: libc::c_int = 0;

    /// `struct f_owner_ex` of include/uapi/asm-generic/fcntl.h.
    #[repr(C)]
    struct OwnerEx {
        kind: libc::c_int,
        pid: libc::pid_t,
    }

    /// A read lease on a file, with a thread that is told when it is to be given back. It is given back when
    /// this is dropped.
    #[derive(Debug)]
    pub(in super::super) struct Guard {
        shared: Arc<Shared>,
        thread: Option<JoinHandle<()>>,
    }

    struct Shared {
        file: File,
        stop: AtomicBool,
        told: Mutex<Told>,
    }

    #[derive(Default)]
    struct Told {
        broken: bool,
        hook: Option<Hook>,
    }

    impl Guard {
        /// Takes the lease on `file`, which is open for reading only. An error also means that the file is on
        /// a file system without leases, belongs to another user, or is open for writing somewhere.
        pub(in super::super) fn take(file: File) -> io::Result<Self> {
            let told = Mutex::default();
            let shared = Arc::new(Shared { file, stop: AtomicBool::new(false), told });
            let (sender, taken) = mpsc::channel();
            let watched = Arc::clone(&shared);
            // The thread takes the lease itself: the signal has to be kept from it first.
            let watch = move || match watched.begin() {
                Ok(signal) => {
                    let _ = sender.send(Ok(()));
                    watched.watch(&signal);
                }
                Err(error) => drop(sender.send(Err(error))),
            };
            let thread = thread::Builder::new().name("template".into()).spawn(watch)?;
            let guard = Self { shared, thread: Some(thread) };
            match taken.recv() {
                Ok(taken) => taken.map(|()| guard),
                Err(_) => Err(io::Error::other("the thread that takes the lease has ended")),
            }
        }

        /// The file.
        pub(in super::super) fn file(&self) -> &File {
            &self.shared.file
        }

        /// Has `hook` called, once, when somebody waits to change the file; at once if that is so already.
        pub(in super::super) fn on_break(&self, hook: Hook) {
            let mut told = self.shared.told.lock();
            match told.broken {
                true => {
                    drop(told);
                    hook();
                }
                false => told.hook = Some(hook),
            }
        }
    }

    impl Shared {
        /// Takes the lease for this thread, and returns the signals that it waits for.
        fn begin(&self) -> io::Result<libc::sigset_t> {
            let mut signal = MaybeUninit::uninit();
            // SAFETY: sigemptyset fills the set in before it is read; SIGIO is a signal; the mask that was
            // there is not asked for.
            let signal = unsafe {
                check(libc::sigemptyset(signal.as_mut_ptr()))?;
                check(libc::sigaddset(signal.as_mut_ptr(), libc::SIGIO))?;
                let signal = signal.assume_init();
                match libc::pthread_sigmask(libc::SIG_BLOCK, &signal, ptr::null_mut()) {
                    0 => signal,
                    error => return Err(io::Error::from_raw_os_error(error)),
                }
            };
            let fd = self.file.as_raw_fd();
            // SAFETY: gettid has no conditions. F_SETOWN_EX reads an `f_owner_ex` (fcntl(2)), which lives
            // through the call; F_SETLEASE takes an int.
            unsafe {
                // Before the lease, which else gives the signal to the process, and with it its end.
                let owner = OwnerEx { kind: F_OWNER_TID, pid: libc::gettid() };
                check(libc::fcntl(fd, F_SETOWN_EX, &owner))?;
                check(libc::fcntl(fd, libc::F_SETLEASE, libc::F_RDLCK))?;
            }
            Ok(signal)
        }

        /// Waits until the lease is to be given back, or until [`Guard`] is dropped.
        fn watch(&self, signal: &libc::sigset_t) {
            while !self.stop.load(Ordering::Acquire) {
                // SAFETY: F_GETLEASE has no argument.
                let lease = unsafe { libc::fcntl(self.file.as_raw_fd(), libc::F_GETLEASE) };
                if lease != libc::F_RDLCK {
                    let hook = {
                        let mut told = self.told.lock();
                        told.broken = true;
                        told.hook.take()
                    };
                    if let Some(hook) = hook {
                        hook();
                    }
                    return;
                }
                // SAFETY: the set is whole; nothing is asked about the signal. An error (EINTR) is one more
                // round.
                unsafe { libc::sigwaitinfo(signal, ptr::null_mut()) };
            }
        }
    }

    impl Drop for Guard {
        fn drop(&mut self) {
            self.shared.stop.store(true, Ordering::Release);
            let Some(thread) = self.thread.take() else { return };
            // The hook may have been the last to have the memory.
            if thread.thread().id() == thread::current().id() {
                return;
            }
            // SAFETY: the thread has not been joined, so its handle is valid. It has the signal blocked, or has
            // ended.
            unsafe { libc::pthread_kill(thread.as_pthread_t(), libc::SIGIO) };
            // A panic in it has been reported by the runtime.
            let _ = thread.join();
        }
    }

    impl std::fmt::Debug for Shared {
        fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
            f.debug_struct("Shared").field("file", &self.file).finish_non_exhaustive()
        }
    }

    fn check(result: libc::c_int) -> io::Result<()> {
        if result == -1 { Err(io::Error::last_os_error()) } else { Ok(()) }
    }
}

#[cfg(not(target_os = "linux"))]
mod sys {
    use std::{fs::File, io};

    use super::Hook;

    /// No such thing here.
    #[derive(Debug)]
    pub(in super::super) enum Guard {}

    impl Guard {
        pub(in super::super) fn take(_: File) -> io::Result<Self> {
            Err(io::ErrorKind::Unsupported.into())
        }

        pub(in super::super) fn file(&self) -> &File {
            match *self {}
        }

        pub(in super::super) fn on_break(&self, _: Hook) {
            match *self {}
        }
    }
}

#[cfg(all(test, target_os = "linux"))]
mod tests {
    use std::{
        fs::{self, File},
        sync::mpsc,
        thread,
        time::Duration,
    };

    use super::*;
    use crate::memory::{FromFileError, GuestRam};

    #[test]
    fn who_wants_to_change_the_file_waits_until_the_guard_is_gone() {
        let file = tempfile::NamedTempFile::new().unwrap();
        file.as_file().set_len(4096).unwrap();
        let path = file.into_temp_path();
        let guard = Guard::take(File::open(&path).unwrap()).unwrap();
        let (sender, told) = mpsc::channel();
        guard.on_break(Box::new(move || sender.send(()).unwrap()));
        let place = path.to_path_buf();
        let changer = thread::spawn(move || fs::write(place, ""));
        told.recv_timeout(Duration::from_secs(30)).unwrap();
        assert_eq!(fs::metadata(&path).unwrap().len(), 4096);
        // Who asks late is told as well.
        let (sender, late) = mpsc::channel();
        guard.on_break(Box::new(move || sender.send(()).unwrap()));
        late.try_recv().unwrap();
        drop(guard);
        changer.join().unwrap().unwrap();
        assert_eq!(fs::metadata(&path).unwrap().len(), 0);
    }

    #[test]
    fn a_file_that_is_open_for_writing_or_not_as_it_should_be_is_not_mapped() {
        let file = tempfile::NamedTempFile::new().unwrap();
        file.as_file().set_len(1 << 20).unwrap();
        let open = || File::open(file.path()).unwrap();
        let error = GuestRam::from_file(open(), 1 << 20, 16, |_| true).unwrap_err();
        assert!(matches!(error, FromFileError::Unguarded(_)), "{error}");
        let path = file.into_temp_path();
        let open = || File::open(&path).unwrap();
        let error = GuestRam::from_file(open(), 1 << 20, 16, |_| false).unwrap_err();
        assert!(matches!(error, FromFileError::Changed), "{error}");
        let error = GuestRam::from_file(open(), 2 << 20, 16, |_| true).unwrap_err();
        assert!(matches!(error, FromFileError::Io(_)), "{error}");
        drop(GuestRam::from_file(open(), 1 << 20, 16, |_| true).unwrap());
        fs::write(&path, "free again").unwrap();
    }
}
