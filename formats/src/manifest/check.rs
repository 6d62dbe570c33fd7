//! Whether the parts of a manifest fit together.

use std::collections::HashSet;

use super::*;

impl Manifest {
    /// Whether the parts fit together: names stay in the directory, nothing is listed twice, sections
    /// fill `state` without a gap, every image has its files and every file belongs to something.
    pub fn check(&self) -> Result<(), FormatError> {
        let lists = [
            ("images", self.images.len()),
            ("sections", self.sections.len()),
            ("files", self.files.len()),
            ("disks", self.machine.disks.len()),
            ("ID registers", self.cpu.id_registers.len()),
            (
                "unreadable registers",
                self.host_backend.as_ref().map_or(0, |host| host.unreadable.len()),
            ),
        ];
        for (name, len) in lists {
            if len > MAX_RECORDS {
                return Err(field(
                    name,
                    format!("{len} records, at most {MAX_RECORDS} are allowed"),
                ));
            }
        }
        match &self.parent_hint {
            Some(_) if self.parent.is_none() => {
                return Err(field("parent hint", "there is no parent"));
            }
            Some(hint) if hint.len() > MAX_HINT => {
                return Err(field(
                    "parent hint",
                    format!("{} bytes, at most {MAX_HINT}", hint.len()),
                ));
            }
            _ => {}
        }
        if let Some(Operation { on_reset: _, initrd_digest: Some(_) }) = self.operation
            && self.machine.initrd.is_none()
        {
            return Err(field("initrd digest", "there is no initrd"));
        }
        self.check_files()?;
        self.check_sections()?;
        self.check_images()?;
        self.check_disks()?;
        self.check_cpu()
    }

    fn check_files(&self) -> Result<(), FormatError> {
        let mut owned: HashSet<String> = HashSet::from([STATE_FILE.to_owned()]);
        for image in &self.images {
            names::check(&image.name)?;
            for name in [image.index_file(), image.data_file(), image.raw_file()] {
                if !owned.insert(name.clone()) {
                    return Err(field("images", format!("two claim the file `{name}`")));
                }
            }
        }
        let boot_files = match &self.operation {
            Some(Operation { on_reset: _, initrd_digest }) => {
                [(KERNEL_FILE, self.machine.kernel_digest), (INITRD_FILE, *initrd_digest)]
            }
            None => [(KERNEL_FILE, None), (INITRD_FILE, None)],
        };
        for (name, digest) in boot_files {
            let Some(digest) = digest else { continue };
            owned.insert(name.to_owned());
            if let Ok(file) = self.file(name)
                && file.digest != digest
            {
                let why =
                    format!("{}, the guest was booted from a file with {digest}", file.digest);
                return Err(field(format!("file `{name}`: digest"), why));
            }
        }
        let mut seen = HashSet::new();
        for file in &self.files {
            names::check(&file.name)?;
            if !seen.insert(&file.name) {
                return Err(field("files", format!("`{}` is listed twice", file.name)));
            }
            if !owned.contains(&file.name) {
                return Err(field("files", format!("`{}` belongs to nothing", file.name)));
            }
        }
        Ok(())
    }

    fn check_sections(&self) -> Result<(), FormatError> {
        let mut seen = HashSet::new();
        let mut end = 0u64;
        for (at, section) in self.sections.iter().enumerate() {
            let SectionRecord { kind, instance, version: _, offset, length, digest: _ } = section;
            let wrong = |what: &str, why: String| Err(field(format!("section {at}: {what}"), why));
            if !seen.insert((kind, instance)) {
                return wrong("kind", format!("`{kind}` of instance `{instance}` is listed twice"));
            }
            if *offset != end {
                return wrong("offset", format!("{offset}, the section before ends at {end}"));
            }
            if *length > codec::MAX_PAYLOAD as u64 {
                return wrong("length", format!("{length}, at most {}", codec::MAX_PAYLOAD));
            }
            // Below MAX_STATE + MAX_PAYLOAD: no overflow.
            end += length;
            if end > MAX_STATE {
                let why = format!("{length}, all sections so far take more than {MAX_STATE} bytes");
                return wrong("length", why);
            }
        }
        let found = self.file(STATE_FILE)?.length;
        match found == end {
            true => Ok(()),
            false => Err(FormatError::Length {
                file: STATE_FILE.into(),
                what: "the file".into(),
                expected: end,
                found,
            }),
        }
    }

    fn check_images(&self) -> Result<(), FormatError> {
        for record in &self.images {
            let ImageRecord { name, size, chunk_size, digest } = record;
            let wrong = |what: &str, why: String| Err(field(format!("image {name}: {what}"), why));
            if !image::is_chunk_size(*chunk_size) {
                return wrong("chunk size", format!("{chunk_size} is not allowed"));
            }
            if *size > image::MAX_SIZE {
                return wrong("size", format!("{size} bytes, at most {}", image::MAX_SIZE));
            }
            let index = self.file(&record.index_file())?;
            Index::check_length(record, self.scheme(), index.length)?;
            let data = self.file(&record.data_file())?;
            let Some(raw) = self.raw_file(record) else { continue };
            for (file, expected) in [(raw, *size), (data, 0)] {
                if file.length != expected {
                    return Err(FormatError::Length {
                        file: file.name.clone(),
                        what: "the file".into(),
                        expected,
                        found: file.length,
                    });
                }
            }
            if raw.digest != *digest {
                return wrong("digest", format!("{digest}, {} has {}", raw.name, raw.digest));
            }
        }
        let (memory, ram) = (self.image(MEMORY_IMAGE)?.size, self.machine.memory_size);
        match memory == ram {
            true => Ok(()),
            false => Err(field("image memory: size", format!("{memory}, the machine has {ram}"))),
        }
    }

    fn check_disks(&self) -> Result<(), FormatError> {
        let mut images: HashSet<&str> = self.images.iter().map(|image| &*image.name).collect();
        images.remove(MEMORY_IMAGE);
        let mut seen = HashSet::new();
        for disk in &self.machine.disks {
            let wrong = |why: &str| Err(field(format!("disk `{}`", disk.id.escape_debug()), why));
            let name = disk.image_name();
            names::check(&name)?;
            if !seen.insert(&disk.id) {
                return wrong("is listed twice");
            }
            match disk.storage {
                DiskStorage::Captured => {
                    let image = self.image(&name)?;
                    images.remove(&*name);
                    if (image.size, image.digest) != (disk.size, disk.digest) {
                        return wrong("its size or digest is not that of its image");
                    }
                }
                DiskStorage::Reference(_) if images.contains(&*name) => {
                    return wrong("is a reference, but there is an image of it");
                }
                DiskStorage::Reference(Scheme::Runs) if self.scheme() == Scheme::Chunks => {
                    return wrong("storage 3, which this format does not have");
                }
                DiskStorage::Reference(_) => {}
            }
        }
        match images.iter().min() {
            None => Ok(()),
            Some(name) => Err(field("images", format!("`{name}` belongs to no disk"))),
        }
    }

    fn check_cpu(&self) -> Result<(), FormatError> {
        let Self { machine, cpu, host_backend, .. } = self;
        let ascending = |what: &str, registers: &[u16]| match registers
            .windows(2)
            .all(|pair| pair[0] < pair[1])
        {
            true => Ok(()),
            false => Err(field(what, "not in ascending order, or one is there twice")),
        };
        let registers: Vec<u16> = cpu.id_registers.iter().map(|(register, _)| *register).collect();
        ascending("ID registers", &registers)?;
        let Some(HostBackend { build, unreadable }) = host_backend else { return Ok(()) };
        if machine.backend == "soft" {
            return Err(field(
                "host backend",
                "the backend is soft, which has no part of the host",
            ));
        }
        // It is shown to people, and nothing that an operating system has is longer.
        if build.len() > MAX_BUILD || !build.bytes().all(|byte| byte.is_ascii_graphic()) {
            let why = format!("`{}` is none", build.escape_debug());
            return Err(field("host build", why));
        }
        ascending("unreadable registers", unreadable)
    }
}
