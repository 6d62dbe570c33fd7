//! The `state` file: the payloads of all sections, one behind the other.

use std::{collections::BTreeMap, io::Read};

use crate::{
    digest::Digest,
    error::FormatError,
    manifest::{STATE_FILE, SectionRecord},
    persist::{self, Persist, Section, Versioned},
    publish::Staging,
    snapshot_dir::Snapshot,
};

/// Writes `sections` in their order; the answer goes into the manifest.
pub fn write_sections(
    staging: &mut Staging,
    sections: &[Section],
) -> Result<Vec<SectionRecord>, FormatError> {
    let mut file = staging.create(STATE_FILE)?;
    let mut records = Vec::with_capacity(sections.len());
    for Section { kind, instance, version, payload } in sections {
        records.push(SectionRecord {
            kind: kind.clone(),
            instance: instance.clone(),
            version: *version,
            offset: file.length(),
            length: payload.len() as u64,
            digest: Digest::of(payload),
        });
        file.write(payload)?;
    }
    staging.finish(file)?;
    Ok(records)
}

/// The sections of a snapshot, to be taken one by one by whoever they belong to. What nobody takes is
/// an error of [`finish`](Self::finish).
#[derive(Debug)]
#[must_use = "sections that nobody takes are found by `finish`"]
pub struct Sections {
    left: BTreeMap<(String, String), Section>,
}

impl Sections {
    /// Sections that do not come from a file.
    pub fn new(sections: Vec<Section>) -> Result<Self, FormatError> {
        let mut left = BTreeMap::new();
        for section in sections {
            let key = (section.kind.clone(), section.instance.clone());
            if let Some(twice) = left.insert(key, section) {
                let what = format!("section `{}` of instance `{}`", twice.kind, twice.instance);
                return Err(FormatError::field(STATE_FILE, what, "is there twice"));
            }
        }
        Ok(Self { left })
    }

    /// Reads all sections of `snapshot` and verifies each one's digest, and the file's.
    pub fn read(snapshot: &Snapshot) -> Result<Self, FormatError> {
        let (mut file, record) = snapshot.open_file(STATE_FILE)?;
        let mut whole = blake3::Hasher::new();
        let mut sections = Vec::new();
        for SectionRecord { kind, instance, version, offset: _, length, digest } in
            &snapshot.manifest().sections
        {
            // The manifest's check has bounded the length and made the offsets follow each other.
            let mut payload = Vec::new();
            let read = (&mut file).take(*length).read_to_end(&mut payload);
            read.map_err(|error| FormatError::io(STATE_FILE, "read", error))?;
            whole.update(&payload);
            let found = Digest::of(&payload);
            if found != *digest {
                return Err(FormatError::Digest {
                    file: STATE_FILE.into(),
                    what: format!("section `{kind}` of instance `{instance}`"),
                    expected: *digest,
                    found,
                });
            }
            sections.push(Section {
                kind: kind.clone(),
                instance: instance.clone(),
                version: *version,
                payload,
            });
        }
        record.check(whole.finalize().into())?;
        Self::new(sections)
    }

    /// Takes the section of that kind and instance.
    pub fn take(&mut self, kind: &str, instance: &str) -> Result<Section, FormatError> {
        let found = self.left.remove(&(kind.to_owned(), instance.to_owned()));
        found.ok_or_else(|| FormatError::MissingSection {
            kind: kind.to_owned(),
            instance: instance.to_owned(),
        })
    }

    /// Takes and decodes the state of `instance`.
    pub fn take_state<S: Versioned>(&mut self, instance: &str) -> Result<S, FormatError> {
        Ok(self.take(S::KIND, instance)?.decode()?)
    }

    /// Restores `into` from the section of `instance`.
    pub fn restore<P: Persist>(&mut self, instance: &str, into: &mut P) -> Result<(), FormatError> {
        let section = self.take(P::State::KIND, instance)?;
        Ok(persist::restore_section(into, &section)?)
    }

    /// Kind and instance of the sections that nobody has taken yet.
    pub fn left(&self) -> impl Iterator<Item = (&str, &str)> {
        self.left.keys().map(|(kind, instance)| (&**kind, &**instance))
    }

    /// All sections that nobody has taken yet, in the order of kind and instance.
    pub fn into_rest(self) -> Vec<Section> {
        self.left.into_values().collect()
    }

    /// Whether every section has been taken.
    pub fn finish(self) -> Result<(), FormatError> {
        match self.left.is_empty() {
            true => Ok(()),
            false => Err(FormatError::UnknownSections {
                sections: self.left().map(|(k, i)| format!("`{k}` of instance `{i}`")).collect(),
            }),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn section(kind: &str, instance: &str) -> Section {
        Section { kind: kind.into(), instance: instance.into(), version: 1, payload: vec![1, 2] }
    }

    #[test]
    fn a_section_is_handed_out_once_and_what_is_left_is_named() {
        let mut sections =
            Sections::new(vec![section("vcpu", "0"), section("vcpu", "1"), section("gic", "0")])
                .unwrap();
        assert_eq!(sections.take("vcpu", "1").unwrap(), section("vcpu", "1"));
        let missing = sections.take("vcpu", "1").unwrap_err().to_string();
        assert_eq!(missing, "state: section `vcpu` of instance `1` is missing");
        let left = sections.finish().unwrap_err().to_string();
        assert_eq!(left, "state: nothing takes `gic` of instance `0`, `vcpu` of instance `0`");
    }

    #[test]
    fn two_sections_of_one_name_are_refused() {
        let twice = Sections::new(vec![section("vcpu", "0"), section("vcpu", "0")]);
        assert!(twice.unwrap_err().to_string().contains("`vcpu` of instance `0`"));
    }

    #[test]
    fn all_sections_taken_is_fine() {
        let mut sections = Sections::new(vec![section("gic", "0")]).unwrap();
        sections.take("gic", "0").unwrap();
        sections.finish().unwrap();
    }
}
