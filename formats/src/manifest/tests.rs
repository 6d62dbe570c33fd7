use super::*;

/// A manifest whose parts fit together; nothing in it has bytes.
pub(crate) fn sample() -> Manifest {
    let digest = Digest::of(b"");
    let file = |name: &str, length| FileRecord { name: name.into(), length, digest };
    Manifest {
        writer: "squib 0.3.0".into(),
        host: "linux x86_64".into(),
        created: 1,
        parent: None,
        parent_hint: None,
        host_backend: None,
        operation: None,
        machine: MachineInfo {
            name: "vm".into(),
            memory_size: 1 << 20,
            vcpus: 1,
            cmdline: "console=ttyS0".into(),
            kernel: "/boot/Image".into(),
            kernel_digest: Some(digest),
            initrd: None,
            disks: vec![
                DiskRecord {
                    id: "root".into(),
                    path: "/disk".into(),
                    size: 100_000,
                    read_only: false,
                    storage: DiskStorage::Captured,
                    digest,
                },
                DiskRecord {
                    id: "data".into(),
                    path: "/data".into(),
                    size: 4096,
                    read_only: true,
                    storage: DiskStorage::Reference(Scheme::Chunks),
                    digest,
                },
            ],
            rng: true,
            backend: "soft".into(),
            deterministic: Some(DeterministicInfo { seed: 1, epoch: 2 }),
        },
        cpu: CpuIdentity {
            backend: "soft".into(),
            id_registers: vec![(0xc000, 1), (0xc020, 2)],
            counter_frequency: 62_500_000,
        },
        images: vec![
            ImageRecord { name: "memory".into(), size: 1 << 20, chunk_size: 1 << 16, digest },
            ImageRecord { name: "disk-root".into(), size: 100_000, chunk_size: 1 << 16, digest },
        ],
        sections: vec![
            SectionRecord {
                kind: "serial".into(),
                instance: "0".into(),
                version: 1,
                offset: 0,
                length: 10,
                digest,
            },
            SectionRecord {
                kind: "vcpu".into(),
                instance: "0".into(),
                version: 1,
                offset: 10,
                length: 20,
                digest,
            },
        ],
        files: vec![
            file("state", 30),
            file("memory.idx", 16 * 48),
            file("memory.zst", 7),
            file("disk-root.idx", 2 * 48),
            file("disk-root.zst", 7),
        ],
    }
}

#[test]
fn a_manifest_reads_back_as_written_in_the_codec_and_in_json() {
    let manifest = sample();
    assert_eq!(Manifest::decode(0, &manifest.encode().unwrap()).unwrap(), manifest);
    let json = serde_json::to_string(&manifest).unwrap();
    assert!(json.contains(r#""storage":"captured""#), "{json}");
    assert_eq!(serde_json::from_str::<Manifest>(&json).unwrap(), manifest);
}

#[test]
fn a_difference_is_of_format_1_1_and_keeps_the_place_of_its_parent() {
    let mut manifest = sample();
    manifest.parent = Some(Digest([1; 32]));
    manifest.parent_hint = Some("/a/b".into());
    assert_eq!(manifest.minor(), 1);
    let body = manifest.encode().unwrap();
    assert_eq!(Manifest::decode(1, &body).unwrap(), manifest);
    assert!(Manifest::decode(0, &body).is_err());
    let full = sample().encode().unwrap();
    let text = Manifest::decode(1, &[&full[..], &[0]].concat()).unwrap_err().to_string();
    assert!(text.contains("parent"), "{text}");
    let old = codec::encode(FILE, &Manifest { parent_hint: None, ..manifest.clone() }).unwrap();
    let text = Manifest::decode(0, &old).unwrap_err().to_string();
    assert!(text.contains("parent"), "{text}");
    manifest.parent_hint = Some("x".repeat(MAX_HINT + 1));
    assert!(manifest.encode().unwrap_err().to_string().contains("parent hint"));
}

#[test]
fn a_state_that_no_machine_has_is_refused_from_its_records() {
    let mut manifest = sample();
    manifest.sections.clear();
    // Each is as long as a section may be: a sparse file of 3.3 GB, in no room on the disk.
    for number in 0..210 {
        manifest.sections.push(SectionRecord {
            kind: "vcpu".into(),
            instance: number.to_string(),
            version: 1,
            offset: number << 24,
            length: 1 << 24,
            digest: Digest([0; 32]),
        });
    }
    manifest.files[0].length = 210 << 24;
    let text = manifest.check().unwrap_err().to_string();
    assert!(text.contains("section 4: length") && text.contains("67108864 bytes"), "{text}");
    manifest.sections.truncate(4);
    manifest.files[0].length = MAX_STATE;
    manifest.check().unwrap();
}

/// The sample with the raw bytes of its disk.
fn raw_sample() -> Manifest {
    let mut manifest = sample();
    let (length, digest) = (manifest.images[1].size, manifest.images[1].digest);
    manifest.files[4].length = 0;
    manifest.files.push(FileRecord { name: "disk-root.raw".into(), length, digest });
    manifest
}

#[test]
fn raw_files_are_of_format_1_2_whether_it_is_a_difference_or_not() {
    let full = raw_sample();
    let diff = Manifest {
        parent: Some(Digest([1; 32])),
        parent_hint: Some("/a/b".into()),
        ..raw_sample()
    };
    for manifest in [full, diff] {
        assert_eq!(manifest.minor(), 2);
        let body = manifest.encode().unwrap();
        assert_eq!(Manifest::decode(2, &body).unwrap(), manifest);
        let text = Manifest::decode(1, &body).unwrap_err().to_string();
        assert!(text.contains("raw files: a snapshot of format 1.1 has none"), "{text}");
        assert!(Manifest::decode(0, &body).is_err());
        assert!(Manifest::decode(3, &body).is_err());
        let without = codec::encode(FILE, &(&sample(), None::<String>)).unwrap();
        let text = Manifest::decode(2, &without).unwrap_err().to_string();
        assert!(text.contains("raw files: a snapshot of format 1.2 has one"), "{text}");
    }
}

#[test]
fn raw_files_that_do_not_fit_their_image_are_refused_by_name() {
    type Change = fn(&mut Manifest);
    let cases: &[(&str, Change)] = &[
        ("disk-root.raw: the file is 99999 bytes long, expected 100000", |m| {
            m.files[5].length -= 1
        }),
        ("disk-root.zst: the file is 7 bytes long, expected 0", |m| m.files[4].length = 7),
        ("image disk-root: digest", |m| m.files[5].digest = Digest([1; 32])),
        ("`disk-data.raw` belongs to nothing", |m| m.files[5].name = "disk-data.raw".into()),
        ("`disk-root.raw` is listed twice", |m| m.files.push(m.files[5].clone())),
        ("no file `disk-root.zst`", |m| drop(m.files.remove(4))),
    ];
    for (expected, change) in cases {
        let mut manifest = raw_sample();
        change(&mut manifest);
        let text = manifest.encode().expect_err(expected).to_string();
        assert!(text.contains(expected), "expected `{expected}` in `{text}`");
    }
}

/// The manifest as one of a backend that is a part of the host's system.
fn of_host(mut manifest: Manifest) -> Manifest {
    manifest.machine.backend = "hvf".into();
    let unreadable = vec![0xdf11, 0xdf12];
    manifest.host_backend = Some(HostBackend { build: "24A335".into(), unreadable });
    manifest
}

#[test]
fn what_a_backend_says_of_the_host_is_of_format_1_3_whatever_else_there_is() {
    let diff =
        Manifest { parent: Some(Digest([1; 32])), parent_hint: Some("/a".into()), ..sample() };
    for without in [sample(), raw_sample(), diff] {
        let manifest = of_host(without.clone());
        assert_eq!(manifest.minor(), 3);
        let body = manifest.encode().unwrap();
        assert_eq!(Manifest::decode(3, &body).unwrap(), manifest);
        for minor in [0, 1, 2, 4] {
            assert!(Manifest::decode(minor, &body).is_err(), "as format 1.{minor}");
        }
        assert!(Manifest::decode(3, &without.encode().unwrap()).is_err());
    }
    type Change = fn(&mut Manifest);
    let cases: [(&str, Change); 4] = [
        ("unreadable registers", |m| m.host_backend.as_mut().unwrap().unreadable.reverse()),
        ("host build", |m| m.host_backend.as_mut().unwrap().build = "24\u{1b}[2J".into()),
        ("host build", |m| m.host_backend.as_mut().unwrap().build = "2".repeat(MAX_BUILD + 1)),
        ("the backend is soft", |m| m.machine.backend = "soft".into()),
    ];
    for (expected, change) in cases {
        let mut manifest = of_host(sample());
        change(&mut manifest);
        let text = manifest.encode().expect_err(expected).to_string();
        assert!(text.contains(expected), "expected `{expected}` in `{text}`");
    }
}

#[test]
fn a_truncated_or_damaged_body_is_refused_or_fits_together() {
    let with_host = of_host(sample());
    for manifest in [sample(), raw_sample(), with_host] {
        any_damage_is_refused_or_fits_together(&manifest);
    }
}

fn any_damage_is_refused_or_fits_together(manifest: &Manifest) {
    let minor = manifest.minor();
    let body = manifest.encode().unwrap();
    for len in 0..body.len() {
        assert!(Manifest::decode(minor, &body[..len]).is_err(), "cut to {len}");
    }
    for bit in 0..body.len() * 8 {
        let mut damaged = body.clone();
        damaged[bit / 8] ^= 1 << (bit % 8);
        if let Ok(manifest) = Manifest::decode(minor, &damaged) {
            manifest.check().unwrap();
        }
    }
}

#[test]
fn parts_that_do_not_fit_together_are_refused_by_name() {
    type Change = fn(&mut Manifest);
    let cases: &[(&str, Change)] = &[
        ("../state", |m| m.files[0].name = "../state".into()),
        ("`state` is listed twice", |m| m.files.push(m.files[0].clone())),
        ("`extra` belongs to nothing", |m| {
            m.files.push(FileRecord { name: "extra".into(), ..m.files[0].clone() })
        }),
        ("no file `memory.zst`", |m| drop(m.files.remove(2))),
        ("image memory: size", |m| m.machine.memory_size += 1),
        ("memory.idx: the file is 768 bytes long, expected 816", |m| {
            m.images[0].size += 1;
            m.machine.memory_size += 1;
        }),
        ("image memory: chunk size", |m| m.images[0].chunk_size = 4096),
        ("image memory: size", |m| m.images[0].size = u64::MAX),
        ("section 1: offset", |m| m.sections[1].offset = 9),
        ("section 1: length", |m| m.sections[1].length = u64::MAX),
        ("`serial` of instance `0` is listed twice", |m| m.sections[1].kind = "serial".into()),
        ("state: the file is 30 bytes long, expected 10", |m| drop(m.sections.pop())),
        ("disk `root`", |m| m.machine.disks[0].size += 1),
        ("disk `root`: is listed twice", |m| m.machine.disks[1].id = "root".into()),
        ("no image `disk-data`", |m| m.machine.disks[1].storage = DiskStorage::Captured),
        ("disk `root`: is a reference", |m| {
            m.machine.disks[0].storage = DiskStorage::Reference(Scheme::Chunks)
        }),
        ("`disk-root` belongs to no disk", |m| drop(m.machine.disks.remove(0))),
        ("ID registers", |m| m.cpu.id_registers[1].0 = 0xc000),
        ("at most 4096", |m| m.machine.disks = vec![m.machine.disks[0].clone(); 5000]),
    ];
    for (expected, change) in cases {
        let mut manifest = sample();
        change(&mut manifest);
        let text = manifest.encode().expect_err(expected).to_string();
        assert!(text.contains(expected), "expected `{expected}` in `{text}`");
    }
}

/// Gives `manifest` indexes of one run, as format 1.4 has them.
fn shorten_indexes(manifest: &mut Manifest) {
    for file in manifest.files.iter_mut().filter(|file| file.name.ends_with(".idx")) {
        file.length = 16 + 48;
    }
}

#[test]
fn an_index_of_format_1_4_has_a_record_a_run() {
    let mut manifest = Manifest { operation: Some(Operation::default()), ..sample() };
    for (length, good) in [(64, true), (16 + 16 * 48, true), (16, false), (65, false), (832, false)]
    {
        shorten_indexes(&mut manifest);
        manifest.files[1].length = length;
        assert_eq!(manifest.encode().is_ok(), good, "{length}");
    }
}

#[test]
fn a_disk_outside_has_the_digest_of_its_format_or_keeps_that_of_an_older_one() {
    let mut manifest = Manifest { operation: Some(Operation::default()), ..sample() };
    shorten_indexes(&mut manifest);
    for scheme in [Scheme::Runs, Scheme::Chunks] {
        manifest.machine.disks[1].storage = DiskStorage::Reference(scheme);
        let body = manifest.encode().unwrap();
        assert_eq!(Manifest::decode(4, &body).unwrap(), manifest);
    }
    let mut old = sample();
    old.machine.disks[1].storage = DiskStorage::Reference(Scheme::Runs);
    let text = old.encode().unwrap_err().to_string();
    assert!(text.contains("storage 3, which this format does not have"), "{text}");
}

#[test]
fn what_the_operator_chose_is_of_format_1_4_whatever_else_there_is() {
    let diff =
        Manifest { parent: Some(Digest([1; 32])), parent_hint: Some("/a".into()), ..sample() };
    for without in [sample(), raw_sample(), diff, of_host(sample())] {
        let mut manifest = without;
        manifest.machine.initrd = Some("/boot/initrd".into());
        let initrd_digest = Some(Digest([7; 32]));
        manifest.operation = Some(Operation { on_reset: OnReset::Restart, initrd_digest });
        shorten_indexes(&mut manifest);
        assert_eq!(manifest.minor(), 4);
        let body = manifest.encode().unwrap();
        assert_eq!(Manifest::decode(4, &body).unwrap(), manifest);
        for minor in [0, 1, 2, 3, 5] {
            assert!(Manifest::decode(minor, &body).is_err(), "as format 1.{minor}");
        }
        manifest.machine.initrd = None;
        assert!(manifest.encode().unwrap_err().to_string().contains("initrd digest"));
    }
}

#[test]
fn a_reset_that_means_nothing_is_refused() {
    let mut manifest = Manifest { operation: Some(Operation::default()), ..sample() };
    shorten_indexes(&mut manifest);
    let mut body = manifest.encode().unwrap();
    // The operation is the last field: a byte of the choice, and a byte for no digest.
    let at = body.len() - 2;
    assert_eq!(body[at], OnReset::Exit as u8);
    for value in [0, 3, 255] {
        body[at] = value;
        let text = Manifest::decode(4, &body).unwrap_err().to_string();
        assert!(text.contains(&format!("on reset {value}")), "{text}");
    }
}
