//! Captures while the guest goes on.

use super::*;

/// A machine that stands at an instant and counts as running, so that a capture pauses it exactly there.
struct AtInstant<'a> {
    machine: &'a Machine,
    runs: AtomicBool,
}

impl Guest for AtInstant<'_> {
    fn config(&self) -> &MachineConfig {
        self.machine.config()
    }

    fn is_paused(&self) -> bool {
        false
    }

    fn pause(&self, deadline: Duration) -> Result<(), MachineError> {
        self.machine.pause(deadline)
    }

    fn resume(&self) -> Result<(), MachineError> {
        self.runs.store(true, Ordering::Relaxed);
        self.machine.resume()
    }

    fn stop(&self) {
        self.machine.stop();
    }

    fn save(&self) -> Result<Vec<Section>, MachineError> {
        self.machine.save()
    }

    fn freeze(&self, limit: u64) -> Result<Frozen<RamStore>, MachineError> {
        self.machine.freeze(limit)
    }

    fn cpu_identity(&self) -> CpuIdentity {
        self.machine.cpu_identity()
    }

    fn wall_ns(&self) -> u64 {
        self.machine.time().wall_ns
    }
}

/// Lets the guest write to all of its field once before memory is read.
struct Overtaken<'a>(&'a AtInstant<'a>, u64);

impl Observer for Overtaken<'_> {
    fn begin(&self, phase: &Phase) {
        if *phase != Phase::Memory {
            return;
        }
        assert!(self.0.runs.load(Ordering::Relaxed), "the guest runs while memory is written");
        let granules = self.0.machine.ram().granules();
        let changed = || (0..granules.count()).filter(|g| granules.is_changed(*g)).count() as u64;
        let deadline = Instant::now() + AMPLE;
        while changed() < self.1 {
            assert!(Instant::now() < deadline, "the guest writes past the granules");
            thread::sleep(Duration::from_millis(1));
        }
    }
}

fn live(machine: &Machine, path: &Path, aside: u64, overtaken: u64) -> Captured {
    let guest = AtInstant { machine, runs: AtomicBool::new(false) };
    let observer = Overtaken(&guest, overtaken);
    let options = CaptureOptions {
        live: true,
        aside,
        run: Run { observer: &observer, ..Run::default() },
        ..CaptureOptions::default()
    };
    capture(&guest, path, &options).unwrap()
}

/// What a running deterministic machine has become is what one becomes that was never looked at.
fn check_went_on(machine: &Machine, dir: &Path) {
    machine.pause(AMPLE).unwrap();
    let retired = machine.retired().unwrap()[0].unwrap();
    assert!(retired > START);
    let expected = straight(dir, retired);
    assert!(memory(machine) == expected.0);
    assert_eq!(machine.save().unwrap(), expected.1);
}

#[test]
fn a_live_capture_is_the_moment_of_the_pause_bit_for_bit() {
    let dir = tempfile::tempdir().unwrap();
    let still = snapshot(dir.path());
    let machine = machine(dir.path());
    let path = dir.path().join("live");
    // All 16 MiB of the field have been written to anew when the first of it is read.
    let captured = live(&machine, &path, u64::MAX, 256);
    assert_eq!(captured.timings.throttled, 0);
    assert_eq!(image_digest(&path), image_digest(&still));
    assert_eq!(sections(&path), sections(&still));
    verify(&path, &[], Control::default()).unwrap();
    check_went_on(&machine, dir.path());
}

#[test]
fn a_page_that_the_cpu_knows_to_be_writable_is_put_aside_all_the_same() {
    let dir = tempfile::tempdir().unwrap();
    let still = dir.path().join("still");
    capture(&machine_of(dir.path(), NARROW), &still, &CaptureOptions::default()).unwrap();
    let machine = machine_of(dir.path(), NARROW);
    let path = dir.path().join("live");
    live(&machine, &path, u64::MAX, 16);
    assert_eq!(image_digest(&path), image_digest(&still));
}

#[test]
fn a_guest_that_outruns_a_live_capture_waits_and_is_not_corrupted() {
    let dir = tempfile::tempdir().unwrap();
    let still = snapshot(dir.path());
    let machine = machine(dir.path());
    let path = dir.path().join("live");
    // There is room for 16 granules; the guest waits for the 17th until memory is read.
    let captured = live(&machine, &path, 1 << 20, 16);
    assert!(captured.timings.throttled > 0);
    assert_eq!(image_digest(&path), image_digest(&still));
    check_went_on(&machine, dir.path());
}

#[test]
fn a_live_capture_of_a_machine_that_is_still_being_loaded_is_the_moment_too() {
    let dir = tempfile::tempdir().unwrap();
    let still = snapshot(dir.path());
    for (at, (name, mode)) in modes(dir.path()).into_iter().enumerate() {
        let machine = back(&still, mode).unwrap().machine;
        let path = dir.path().join(format!("live-{at}"));
        live(&machine, &path, u64::MAX, 256);
        assert_eq!(image_digest(&path), image_digest(&still), "{name}");
        check_went_on(&machine, dir.path());
        // And what it wrote since is in the next difference.
        let options = CaptureOptions { parent: Some(path), ..CaptureOptions::default() };
        let diff = dir.path().join(format!("live-{at}-diff"));
        capture(&machine, &diff, &options).unwrap();
        let expected = memory(&machine);
        assert!(memory(&back(&diff, MemoryLoad::Eager).unwrap().machine) == expected, "{name}");
    }
}

#[test]
fn a_live_capture_that_fails_leaves_the_guest_running_and_no_trace() {
    let dir = tempfile::tempdir().unwrap();
    let machine = machine(dir.path());
    let guest = AtInstant { machine: &machine, runs: AtomicBool::new(false) };
    let options = CaptureOptions { live: true, limit: Some(1 << 20), ..CaptureOptions::default() };
    let path = dir.path().join("live");
    capture(&guest, &path, &options).unwrap_err();
    assert!(!path.exists());
    check_went_on(&machine, dir.path());
    // Another one may begin.
    capture(&machine, &path, &CaptureOptions::default()).unwrap();
}
