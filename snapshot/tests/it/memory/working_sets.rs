//! What the guest needs first.

use squib_snapshot::Existing;

use super::*;

#[test]
fn what_the_guest_needs_is_recorded_in_order() {
    let dir = tempfile::tempdir().unwrap();
    let path = snapshot(dir.path());
    let machine = back(&path, MemoryLoad::Record).unwrap().machine;
    machine.run_until(START + 2000).unwrap();
    let recorded = machine.ram().granules().recorded();
    // Its own code first, then the field upwards, where there was something.
    assert_eq!(recorded[0], (0x8020_0000 - 0x8000_0000) >> 16);
    let field = &recorded[1..];
    assert!(field.len() > 10 && field.is_sorted(), "{recorded:?}");
    assert!(field.iter().all(|chunk| (FIELD - 0x8000_0000) >> 16 <= *chunk));
}

#[test]
fn a_working_set_narrows_down_and_comes_first_in_the_file_after_optimize() {
    let dir = tempfile::tempdir().unwrap();
    let path = snapshot(dir.path());
    let run = |until: u64| {
        let machine = back(&path, MemoryLoad::Record).unwrap().machine;
        machine.run_until(until).unwrap();
        record(&path, machine.ram()).unwrap().unwrap()
    };
    let first = run(START + 4000);
    assert_eq!(first.touched, first.common);
    let second = run(START + 2000);
    assert!(second.touched < first.touched);
    assert_eq!(second.common, second.touched, "what both have needed");
    let third = run(START + 4000);
    assert_eq!((third.touched, third.common), (first.touched, second.common));

    let options = Run::default();
    let other = dir.path().join("optimized");
    let made =
        optimize(&path, &[], Some((&other, Existing::Refuse)), &[], Durability::Full, &options)
            .unwrap();
    assert_eq!(made.first, second.common);
    assert_eq!(image_digest(&other), image_digest(&path));
    assert_eq!(sections(&other), sections(&path));
    verify(&other, &[], Control::default()).unwrap();
    let snapshot = Snapshot::open(&other).unwrap();
    let set = WorkingSet::read(&snapshot).unwrap().expect("it goes along");
    let index = ImageReader::open_index(&snapshot, MEMORY_IMAGE).unwrap();
    let mut at = 0;
    for chunk in set.chunks() {
        let (offset, length) = index.record((*chunk).into()).stored().unwrap();
        assert_eq!(offset, at, "chunk {chunk} lies behind the one before");
        at += u64::from(length);
    }
    // In its own place, but not while another builds on it.
    let machine = back(&path, MemoryLoad::Lazy).unwrap().machine;
    machine.run_until(START + 100).unwrap();
    let parent = CaptureOptions { parent: Some(path.clone()), ..CaptureOptions::default() };
    let diff = dir.path().join("diff");
    capture(&machine, &diff, &parent).unwrap();
    let refused = optimize(&path, &[], None, &[], Durability::Full, &options).unwrap_err();
    assert!(refused.to_string().contains("diff"), "{refused}");
    fs::remove_dir_all(&diff).unwrap();
    let again = optimize(&path, &[], None, &[], Durability::Full, &options).unwrap();
    assert_eq!(again.id, Snapshot::open(&path).unwrap().id());
    assert_eq!(again.id, made.id);
    let expected = straight(dir.path(), START + 5000);
    for path in [&path, &other] {
        let restored = back(path, MemoryLoad::Lazy).unwrap().machine;
        restored.run_until(START + 5000).unwrap();
        assert!(memory(&restored) == expected.0);
    }
}

#[test]
fn a_working_set_that_is_damaged_or_of_another_image_is_no_reason_not_to_restore() {
    let dir = tempfile::tempdir().unwrap();
    let path = snapshot(dir.path());
    let expected = memory(&back(&path, MemoryLoad::Eager).unwrap().machine);
    fs::write(path.join("working-set"), [7; 100]).unwrap();
    assert!(memory(&back(&path, MemoryLoad::Lazy).unwrap().machine) == expected);
    let machine = back(&path, MemoryLoad::Record).unwrap().machine;
    machine.run_until(START + 100).unwrap();
    assert!(record(&path, machine.ram()).unwrap().is_some());
    assert!(WorkingSet::read(&Snapshot::open(&path).unwrap()).unwrap().is_some());
}
