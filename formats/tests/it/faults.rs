//! Every step of writing a snapshot fails once, and the writer is killed at every step: there is an error by
//! name, and the snapshot is there whole or not at all.

use std::{
    env, fmt, fs,
    fs::File,
    io,
    os::fd::BorrowedFd,
    path::{Path, PathBuf},
    process::{Command, Stdio},
    sync::{Arc, Mutex},
};

use crate::common::{self, Bytes};
use rustix::{fs::RenameFlags, io::Errno, process::Signal};
use squib_formats::{
    digest::Digest,
    error::FormatError,
    image::{Control, ImageOptions, ImageReader, write_diff},
    layer::{Layer, Real},
    publish::{Existing, Staging},
    sections::write_sections,
    snapshot_dir::Snapshot,
    verify::verify,
};

/// What happens at one step.
#[derive(Clone, Copy, Debug, PartialEq)]
enum Fault {
    None,
    Errno(Errno),
    /// A write takes half of the bytes; any other step is done.
    Short,
    /// The process ends, after half of the bytes if it is a write.
    Kill,
}

/// Counts the steps, and lets one of them go wrong.
struct Faulty {
    at: usize,
    fault: Fault,
    /// What was done, and to which file.
    steps: Mutex<Vec<(&'static str, String)>>,
}

impl fmt::Debug for Faulty {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:?} at step {}", self.fault, self.at)
    }
}

impl Faulty {
    fn new(at: usize, fault: Fault) -> Arc<Self> {
        Arc::new(Self { at, fault, steps: Mutex::default() })
    }

    fn step(&self, action: &'static str, file: impl Into<String>) -> Fault {
        let mut steps = self.steps.lock().unwrap();
        steps.push((action, file.into()));
        if steps.len() - 1 == self.at { self.fault } else { Fault::None }
    }

    /// Any step but a write.
    fn check(&self, action: &'static str, path: &Path) -> io::Result<()> {
        match self.step(action, path.display().to_string()) {
            Fault::Errno(error) => Err(error.into()),
            Fault::Kill => kill(),
            Fault::None | Fault::Short => Ok(()),
        }
    }
}

fn kill() -> ! {
    rustix::process::kill_process(rustix::process::getpid(), Signal::KILL).unwrap();
    unreachable!("killed")
}

impl Layer for Faulty {
    fn make_dir(&self, path: &Path) -> io::Result<()> {
        self.check("make", path)?;
        Real.make_dir(path)
    }

    fn create(&self, dir: BorrowedFd<'_>, name: &str) -> io::Result<File> {
        self.check("create", Path::new(name))?;
        Real.create(dir, name)
    }

    fn clone_file(&self, dir: BorrowedFd<'_>, name: &str, file: &File) -> io::Result<File> {
        self.check("clone", Path::new(name))?;
        common::Copies.clone_file(dir, name, file)
    }

    fn unlink(&self, dir: BorrowedFd<'_>, name: &str) -> io::Result<()> {
        self.check("unlink", Path::new(name))?;
        Real.unlink(dir, name)
    }

    fn write(&self, name: &str, file: &File, bytes: &[u8]) -> io::Result<usize> {
        let half = &bytes[..bytes.len().div_ceil(2)];
        match self.step("write", name) {
            Fault::None => Real.write(name, file, bytes),
            Fault::Errno(error) => Err(error.into()),
            Fault::Short => Real.write(name, file, half),
            Fault::Kill => {
                Real.write(name, file, half)?;
                kill()
            }
        }
    }

    fn sync(&self, name: &str, file: &File) -> io::Result<()> {
        self.check("sync", Path::new(name))?;
        Real.sync(name, file)
    }

    fn sync_dir(&self, path: &Path) -> io::Result<()> {
        self.check("sync", path)?;
        Real.sync_dir(path)
    }

    fn rename(&self, from: &Path, to: &Path, flags: RenameFlags) -> io::Result<()> {
        self.check("rename", to)?;
        Real.rename(from, to, flags)
    }

    fn remove_old(&self, path: &Path, names: &[String]) -> io::Result<bool> {
        self.check("remove", path)?;
        Real.remove_old(path, names)
    }

    fn remove(&self, path: &Path) -> io::Result<()> {
        self.check("remove", path)?;
        Real.remove(path)
    }
}

/// What is written: a full snapshot, one with a raw disk, a difference, or a full one in the place of another.
#[derive(Clone, Copy, Debug, PartialEq)]
enum Create {
    Full,
    Raw,
    Diff,
    Replace,
}

const ALL: [Create; 4] = [Create::Full, Create::Raw, Create::Diff, Create::Replace];

impl Create {
    /// A directory with what is there before.
    fn prepare(self) -> (tempfile::TempDir, PathBuf) {
        let dir = tempfile::tempdir().unwrap();
        match self {
            Self::Full | Self::Raw => {}
            Self::Diff => drop(common::publish(&dir.path().join("base"))),
            Self::Replace => drop(common::publish(&dir.path().join("snap"))),
        }
        let path = dir.path().join("snap");
        (dir, path)
    }

    /// Writes the snapshot at `path`.
    fn run(self, path: &Path, layer: Arc<Faulty>) -> Result<Digest, FormatError> {
        let existing = match self {
            Self::Replace => Existing::Replace,
            Self::Full | Self::Raw | Self::Diff => Existing::Refuse,
        };
        let mut staging = Staging::with_layer(path, existing, layer)?;
        if self != Self::Diff {
            let mut manifest = match self {
                Self::Raw => {
                    // What is tried and not wanted leaves nothing behind.
                    let file = common::file_of(b"tried");
                    if let Some(clone) = staging.clone_file("disk-root.raw", &file, 5)? {
                        staging.discard(clone)?;
                    }
                    common::stage_raw(&mut staging, Control::default())?
                }
                _ => common::stage(&mut staging, Control::default())?,
            };
            manifest.machine.name = "new".into();
            return staging.publish(manifest);
        }
        let parent = Snapshot::open(&path.with_file_name("base"))?;
        let mut manifest = parent.manifest().clone();
        manifest.parent = Some(parent.id());
        manifest.sections = write_sections(&mut staging, &common::sections())?;
        let mut memory = common::memory();
        memory[2 << 16] ^= 1;
        memory[7 << 16..8 << 16].fill(0x77);
        manifest.images.clear();
        for (name, bytes) in [("memory", memory), ("disk-root", common::disk())] {
            let base = ImageReader::open(&parent, name)?;
            let (source, options) = (Bytes(bytes), ImageOptions::default());
            let control = Control::default();
            let written = write_diff(&mut staging, name, &source, &base, options, control)?;
            manifest.images.push(written.record);
        }
        staging.publish(manifest)
    }

    /// The steps of a run in which nothing goes wrong.
    fn steps(self) -> Vec<(&'static str, String)> {
        let (_keep, path) = self.prepare();
        let layer = Faulty::new(usize::MAX, Fault::None);
        self.run(&path, layer.clone()).unwrap();
        std::mem::take(&mut layer.steps.lock().unwrap())
    }

    /// Whether the directory is as before: `false` if the new snapshot is there, whole.
    fn is_as_before(self, dir: &Path) -> bool {
        let path = dir.join("snap");
        if self == Self::Diff {
            verify(&dir.join("base"), &[], Control::default()).unwrap();
        }
        if self != Self::Replace && !path.exists() {
            return true;
        }
        let found = verify(&path, &[], Control::default()).unwrap_or_else(|e| panic!("{e}"));
        self == Self::Replace && found.snapshot.manifest().machine.name != "new"
    }

    /// Names beside the snapshot's own that are there before.
    fn others(self) -> &'static [&'static str] {
        if self == Self::Diff { &["base"] } else { &[] }
    }

    /// Writes the snapshot once more, which must succeed and leave no trace of what was before.
    fn again(self, dir: &Path, as_before: bool) {
        let create = if as_before { self } else { Self::Replace };
        create.run(&dir.join("snap"), Faulty::new(usize::MAX, Fault::None)).unwrap();
        assert!(!self.is_as_before(dir));
        assert_eq!(common::names(dir), [self.others(), &["snap"]].concat());
    }
}

#[test]
fn every_step_that_fails_is_named_and_leaves_all_as_it_was() {
    for create in ALL {
        let steps = create.steps();
        assert!(steps.len() > 20, "{steps:?}");
        for error in [Errno::NOSPC, Errno::IO] {
            for at in 0..steps.len() {
                let (keep, path) = create.prepare();
                let before = common::names(keep.path());
                let layer = Faulty::new(at, Fault::Errno(error));
                let result = create.run(&path, layer.clone());
                let (action, file) = layer.steps.lock().unwrap()[at].clone();
                let what = format!("{create:?}, {error} at step {at}, {action} {file}");
                if action == "remove" {
                    // The new snapshot is safe by then; what is left of the old one is swept below.
                    result.unwrap_or_else(|e| panic!("{what}: {e}"));
                    assert!(!create.is_as_before(keep.path()), "{what}");
                    create.again(keep.path(), false);
                    continue;
                }
                let found = result.expect_err(&what);
                let text = found.to_string();
                match &found {
                    FormatError::NoRoom { source, .. } if error == Errno::NOSPC => {
                        assert_eq!(Errno::from_io_error(source), Some(error), "{what}");
                    }
                    FormatError::Io { source, action: told, .. } if error == Errno::IO => {
                        assert_eq!(Errno::from_io_error(source), Some(error), "{what}");
                        let told = told.split(' ').next().unwrap();
                        assert_eq!(
                            told,
                            match action {
                                "make" => "create",
                                "unlink" => "remove",
                                other => other,
                            },
                            "{what}"
                        );
                    }
                    other => panic!("{what}: {other:?}"),
                }
                // The sync of the directory around is told as one of the snapshot's place.
                let file =
                    if Path::new(&file) == keep.path() { path.display().to_string() } else { file };
                assert!(text.starts_with(&format!("{file}: ")), "{what}: {text}");
                assert!(create.is_as_before(keep.path()), "{what}");
                assert_eq!(common::names(keep.path()), before, "{what}");
                create.again(keep.path(), true);
            }
        }
    }
}

#[test]
fn a_short_write_is_continued() {
    for create in ALL {
        let (keep, path) = create.prepare();
        let whole = create.run(&path, Faulty::new(usize::MAX, Fault::None)).unwrap();
        for (at, (action, file)) in create.steps().iter().enumerate() {
            let (_keep, path) = create.prepare();
            let id = create.run(&path, Faulty::new(at, Fault::Short)).unwrap();
            assert_eq!(id, whole, "{create:?}, step {at}, {action} {file}");
            verify(&path, &[], Control::default()).unwrap();
        }
        drop(keep);
    }
}

/// Tells a child process where to write, what, and the step at which it ends.
const CHILD: &str = "SQUIB_TEST_FAULTS_CHILD";

#[test]
#[ignore = "the child process of a_writer_killed_at_any_step_leaves_a_whole_snapshot_or_none"]
fn a_writer_that_is_killed_at_a_step() {
    // Run by hand there is nothing to do.
    let Some(job) = env::var_os(CHILD) else { return };
    let job = job.into_string().unwrap();
    let (create, rest) = job.split_once(' ').unwrap();
    let (at, path) = rest.split_once(' ').unwrap();
    let create = ALL.into_iter().find(|one| format!("{one:?}") == create).unwrap();
    create.run(Path::new(path), Faulty::new(at.parse().unwrap(), Fault::Kill)).unwrap();
    panic!("not killed");
}

#[test]
fn a_writer_killed_at_any_step_leaves_a_whole_snapshot_or_none() {
    for create in ALL {
        let steps = create.steps();
        let renamed = steps.iter().position(|(action, _)| *action == "rename").unwrap();
        for (at, (action, file)) in steps.iter().enumerate() {
            let what = format!("{create:?}, killed at step {at}, {action} {file}");
            let (keep, path) = create.prepare();
            let status = Command::new(env::current_exe().unwrap())
                .args(["--exact", "faults::a_writer_that_is_killed_at_a_step", "--ignored"])
                .env(CHILD, format!("{create:?} {at} {}", path.display()))
                .stdout(Stdio::null())
                .status()
                .unwrap();
            assert_eq!(std::os::unix::process::ExitStatusExt::signal(&status), Some(9), "{what}");
            let as_before = create.is_as_before(keep.path());
            assert_eq!(as_before, at <= renamed, "{what}");
            // Nothing but what was there, the snapshot, and what the next writer sweeps.
            let others = |name: &String| {
                name != "snap"
                    && !create.others().contains(&&**name)
                    && !name.starts_with(".snap.partial-")
            };
            let names = common::names(keep.path());
            assert!(!names.iter().any(others), "{what}: {names:?}");
            create.again(keep.path(), as_before);
        }
    }
}

#[test]
fn where_renames_cannot_exchange_two_of_them_do() {
    /// A file system that knows no flags of rename, as older ones.
    #[derive(Debug)]
    struct NoFlags {
        fail_second: bool,
        renames: Mutex<u32>,
    }
    impl Layer for NoFlags {
        fn rename(&self, from: &Path, to: &Path, flags: RenameFlags) -> io::Result<()> {
            if !flags.is_empty() {
                return Err(Errno::INVAL.into());
            }
            let mut renames = self.renames.lock().unwrap();
            *renames += 1;
            match self.fail_second && *renames == 2 {
                true => Err(Errno::IO.into()),
                false => Real.rename(from, to, flags),
            }
        }
    }
    for fail_second in [false, true] {
        let (keep, path) = Create::Replace.prepare();
        let old = Snapshot::open(&path).unwrap().id();
        let layer = Arc::new(NoFlags { fail_second, renames: Mutex::default() });
        let mut staging = Staging::with_layer(&path, Existing::Replace, layer).unwrap();
        let mut manifest = common::stage(&mut staging, Control::default()).unwrap();
        manifest.machine.name = "new".into();
        let result = staging.publish(manifest);
        assert_eq!(result.is_err(), fail_second, "{result:?}");
        let found = verify(&path, &[], Control::default()).unwrap().snapshot.id();
        assert_eq!(found == old, fail_second);
        assert_eq!(common::names(keep.path()), ["snap"]);
        assert!(fs::metadata(&path).unwrap().is_dir());
    }
}

#[test]
fn what_comes_into_a_snapshot_at_the_moment_when_it_is_replaced_is_kept() {
    /// Somebody puts a file into the old snapshot just before it is exchanged.
    #[derive(Debug)]
    struct Late;
    impl Layer for Late {
        fn rename(&self, from: &Path, to: &Path, flags: RenameFlags) -> io::Result<()> {
            if flags == RenameFlags::EXCHANGE {
                std::fs::write(to.join("late"), "x")?;
            }
            Real.rename(from, to, flags)
        }
    }
    let (keep, path) = Create::Replace.prepare();
    let mut staging = Staging::with_layer(&path, Existing::Replace, Arc::new(Late)).unwrap();
    let manifest = common::stage(&mut staging, Control::default()).unwrap();
    let id = staging.publish(manifest).unwrap();
    assert_eq!(verify(&path, &[], Control::default()).unwrap().snapshot.id(), id);
    // A later writer leaves it, too.
    drop(Staging::new(&path, Existing::Replace).unwrap());
    let names = common::names(keep.path());
    let rest = names.iter().find(|name| name.starts_with("snap.rest-")).unwrap();
    assert_eq!(common::names(&keep.path().join(rest)), ["late"]);
}
