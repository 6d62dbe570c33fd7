//! Templates: made once, private, exchanged for nothing.

use super::*;

#[test]
fn a_template_is_made_once_and_is_private() {
    let dir = tempfile::tempdir().unwrap();
    let path = snapshot(dir.path());
    let cache = cache(dir.path());
    let snapshot = Snapshot::open(&path).unwrap();
    let image = ImageReader::open(&snapshot, MEMORY_IMAGE).unwrap();
    assert!(cache.find(image.record()).unwrap().is_none());
    thread::scope(|scope| {
        for _ in 0..4 {
            scope.spawn(|| cache.get(&image, Control::default()).unwrap().map().unwrap());
        }
    });
    let templates = cache.list().unwrap();
    assert_eq!(templates.len(), 1);
    assert_eq!(templates[0].digest, image.record().digest.to_string());
    assert_eq!(templates[0].size, MEMORY);
    assert!(templates[0].stored < MEMORY, "zero chunks are holes");
    let mode = |path: &Path| fs::metadata(path).unwrap().permissions().mode() & 0o7777;
    assert_eq!(mode(&dir.path().join("templates")), 0o700);
    assert_eq!(mode(&templates[0].path), 0o700);
    assert_eq!(mode(&templates[0].path.join("memory")), 0o400);
    // Once it is there the image is not needed, and one file serves all.
    let inode = fs::metadata(templates[0].path.join("memory")).unwrap().ino();
    fs::write(path.join("memory.zst"), "").unwrap();
    cache.get(&image, Control::default()).unwrap();
    assert_eq!(fs::metadata(templates[0].path.join("memory")).unwrap().ino(), inode);
    let names: Vec<_> = fs::read_dir(dir.path().join("templates")).unwrap().flatten().collect();
    assert_eq!(names.len(), 1, "{names:?}");
}

#[test]
fn machines_from_one_template_do_not_see_each_others_writes() {
    let dir = tempfile::tempdir().unwrap();
    let path = snapshot(dir.path());
    let mode = || MemoryLoad::Template(cache(dir.path()));
    let (one, two) = (back(&path, mode()).unwrap().machine, back(&path, mode()).unwrap().machine);
    one.run_until(START + 9000).unwrap();
    assert!(memory(&two) == memory(&back(&path, MemoryLoad::Eager).unwrap().machine));
    two.run_until(START + 9000).unwrap();
    assert!(memory(&one) == memory(&two));
    let restored = back(&path, mode()).unwrap().machine;
    assert_eq!(restored.retired().unwrap(), [Some(START)]);
}

#[test]
fn a_template_that_was_written_to_or_exchanged_is_made_again() {
    let dir = tempfile::tempdir().unwrap();
    let path = snapshot(dir.path());
    let expected = memory(&back(&path, MemoryLoad::Eager).unwrap().machine);
    let mode = || MemoryLoad::Template(cache(dir.path()));
    back(&path, mode()).unwrap();
    let place = cache(dir.path()).list().unwrap().remove(0).path;
    let file = place.join("memory");
    let writable = |on| fs::set_permissions(&file, fs::Permissions::from_mode(on)).unwrap();
    let changes: [(&str, &dyn Fn()); 5] = [
        ("written to", &|| {
            writable(0o600);
            let times = fs::metadata(&file).unwrap();
            let mut bytes = fs::read(&file).unwrap();
            bytes[FIELD as usize - 0x8000_0000 + (21 << 20)] ^= 1;
            fs::write(&file, bytes).unwrap();
            // Even with the old time of modification.
            let open = fs::OpenOptions::new().write(true).open(&file).unwrap();
            open.set_modified(times.modified().unwrap()).unwrap();
            writable(0o400);
        }),
        ("exchanged", &|| {
            let bytes = fs::read(&file).unwrap();
            fs::remove_file(&file).unwrap();
            fs::write(&file, bytes).unwrap();
            writable(0o400);
        }),
        ("a link", &|| {
            let elsewhere = dir.path().join("elsewhere");
            fs::rename(&file, &elsewhere).unwrap();
            std::os::unix::fs::symlink(elsewhere, &file).unwrap();
        }),
        ("cut off", &|| {
            writable(0o600);
            fs::OpenOptions::new().write(true).open(&file).unwrap().set_len(1 << 20).unwrap();
            writable(0o400);
        }),
        ("without its seal", &|| fs::remove_file(place.join("seal")).unwrap()),
    ];
    for (name, change) in changes {
        change();
        let restored = back(&path, mode()).unwrap();
        assert!(memory(&restored.machine) == expected, "{name}");
        assert!(fs::symlink_metadata(&file).unwrap().is_file(), "{name}");
    }
}

#[test]
fn a_template_folder_that_others_may_enter_is_refused() {
    let dir = tempfile::tempdir().unwrap();
    let path = snapshot(dir.path());
    let place = dir.path().join("templates");
    fs::create_dir(&place).unwrap();
    fs::set_permissions(&place, fs::Permissions::from_mode(0o755)).unwrap();
    let error = back(&path, MemoryLoad::Template(cache(dir.path()))).err().unwrap();
    assert!(matches!(error, RestoreError::Template(CacheError::NotPrivate { .. })), "{error}");
    assert!(error.to_string().contains("chmod 700"), "{error}");
}

#[test]
fn a_damaged_chunk_never_becomes_part_of_a_template() {
    let dir = tempfile::tempdir().unwrap();
    let path = snapshot(dir.path());
    let (chunk, offset) = last_frame(&path);
    damage(&path, offset);
    let error = back(&path, MemoryLoad::Template(cache(dir.path()))).err().unwrap();
    let damaged = matches!(
        error,
        RestoreError::Format(FormatError::Chunk { .. } | FormatError::Digest { .. })
    );
    assert!(damaged, "{error}");
    assert!(error.to_string().contains(&format!("chunk {chunk}")), "{error}");
    let left: Vec<_> = fs::read_dir(dir.path().join("templates")).unwrap().flatten().collect();
    assert!(left.is_empty(), "{left:?}");
}

#[test]
fn the_least_recently_used_templates_give_way() {
    let dir = tempfile::tempdir().unwrap();
    let machine = machine(dir.path());
    let place = dir.path().join("templates");
    let unlimited = TemplateCache::new(&place, u64::MAX);
    let mut snapshots = Vec::new();
    for round in 0..3 {
        machine.run_until(START + round * 7000).unwrap();
        let path = dir.path().join(round.to_string());
        capture(&machine, &path, &CaptureOptions::default()).unwrap();
        snapshots.push(path);
    }
    let template = |path: &Path, cache: &TemplateCache| {
        drop(back(path, MemoryLoad::Template(cache.clone())).unwrap());
        // Times of use must differ.
        thread::sleep(Duration::from_millis(20));
    };
    template(&snapshots[0], &unlimited);
    template(&snapshots[1], &unlimited);
    // Used again, so the other one is older.
    template(&snapshots[0], &unlimited);
    let stored: u64 = unlimited.list().unwrap().iter().map(|template| template.stored).sum();
    template(&snapshots[2], &TemplateCache::new(&place, stored + (1 << 20)));
    let left: Vec<_> = unlimited.list().unwrap().into_iter().map(|t| t.digest).collect();
    assert_eq!(left, [image_digest(&snapshots[0]), image_digest(&snapshots[2])]);
    // One that was being made when its process was killed.
    fs::create_dir(place.join(".making-x")).unwrap();
    assert_eq!(unlimited.prune(0).unwrap().len(), 2);
    assert!(fs::read_dir(&place).unwrap().next().is_none());
}

#[test]
fn a_template_that_others_change_under_a_machine_ends_it_before_it_changes() {
    let dir = tempfile::tempdir().unwrap();
    let path = snapshot(dir.path());
    let mode = || MemoryLoad::Template(cache(dir.path()));
    drop(back(&path, mode()).unwrap());
    let file = cache(dir.path()).list().unwrap().remove(0).path.join("memory");
    type Change = fn(&Path) -> std::io::Result<()>;
    let changes: [(&str, Change); 3] = [
        ("cut off", |file| fs::OpenOptions::new().write(true).open(file)?.set_len(0)),
        ("written over", |file| fs::write(file, [7; 4096])),
        ("opened", |file| fs::OpenOptions::new().write(true).open(file).map(drop)),
    ];
    for (name, change) in changes {
        let restored = back(&path, mode()).unwrap();
        let expected = memory(&restored.machine);
        fs::set_permissions(&file, fs::Permissions::from_mode(0o600)).unwrap();
        thread::scope(|scope| {
            let changer = scope.spawn(|| change(&file));
            let Outcome::Damaged(why) = restored.machine.wait() else { panic!("{name}") };
            assert!(why.to_string().contains("another program"), "{name}: {why}");
            // As long as the memory is there, so are its bytes.
            assert!(memory(&restored.machine) == expected, "{name}");
            drop(restored);
            changer.join().unwrap().unwrap();
        });
        // It was changed, so that the next machine gets another.
        drop(back(&path, mode()).unwrap());
    }
}
