//! Where the guest's console goes. The machine writes from a thread of its own, so that a slow reader holds
//! up neither the vCPU that happened to write a byte nor a pause.

use std::{
    io::{self, ErrorKind, Write},
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicU64, Ordering},
    },
};

use crate::output::{Stdout, say};

/// The writing end; clones write to the same place. A sink that fails does not end the guest.
#[derive(Clone, Default)]
pub(crate) struct Output<S = Stdout> {
    sink: S,
    lost: Arc<Lost>,
}

#[derive(Default)]
struct Lost {
    /// There is no reader any more: what comes is dropped.
    closed: AtomicBool,
    /// Bytes that could not be written for another reason.
    bytes: AtomicU64,
}

impl<S> Output<S> {
    /// Bytes that could not be written, but for those after the reader had gone.
    pub(crate) fn lost(&self) -> u64 {
        self.lost.bytes.load(Ordering::Relaxed)
    }
}

impl<S: Write> Write for Output<S> {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        if self.lost.closed.load(Ordering::Relaxed) {
            return Ok(bytes.len());
        }
        match self.sink.write(bytes) {
            Err(e) if e.kind() == ErrorKind::BrokenPipe => {
                self.lost.closed.store(true, Ordering::Relaxed);
                say!("squib: the console output is closed ({e}); the VM runs on");
            }
            // A device that is full may have room later.
            Err(e) if e.kind() != ErrorKind::Interrupted => {
                let count = bytes.len() as u64;
                if self.lost.bytes.fetch_add(count, Ordering::Relaxed) == 0 {
                    say!("squib: console output is lost ({e}); the VM runs on");
                }
            }
            taken => return taken,
        }
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        self.sink.flush()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Fails with the first of its errors in each write, and then takes everything.
    #[derive(Default)]
    struct Failing(Vec<ErrorKind>, Vec<u8>);

    impl Write for Failing {
        fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
            if !self.0.is_empty() {
                return Err(self.0.remove(0).into());
            }
            self.1.extend_from_slice(bytes);
            Ok(bytes.len())
        }

        fn flush(&mut self) -> io::Result<()> {
            Ok(())
        }
    }

    fn output(errors: &[ErrorKind]) -> Output<Failing> {
        Output { sink: Failing(errors.to_vec(), Vec::new()), lost: Arc::default() }
    }

    #[test]
    fn a_guest_goes_on_when_nobody_reads_its_console_any_more() {
        let mut output = output(&[ErrorKind::BrokenPipe]);
        output.write_all(b"one").unwrap();
        output.write_all(b"two").unwrap();
        assert_eq!((output.lost(), output.sink.1.as_slice()), (0, &b""[..]));
    }

    #[test]
    fn what_a_full_device_does_not_take_is_counted_and_what_comes_later_is_written() {
        let mut output = output(&[ErrorKind::StorageFull, ErrorKind::StorageFull]);
        let other = output.lost.clone();
        for text in ["one", "three", "five"] {
            output.write_all(text.as_bytes()).unwrap();
        }
        assert_eq!(
            (other.bytes.load(Ordering::Relaxed), output.sink.1.as_slice()),
            (8, &b"five"[..])
        );
    }
}
