//! The `state` file: the payloads of all sections, one behind the other.

use std::{collections::BTreeMap, io::Read};

use crate::{
    digest::Digest,
    error::FormatError,
    manifest::{STATE_FILE, SectionRecord},
    persist::{self, Persist, PersistError, Section, Versioned},
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

/// A section that a reader has a place for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Wanted<'a> {
    /// Kind of the state.
    pub kind: &'static str,
    /// Which of several of that kind.
    pub instance: &'a str,
    /// The newest version of the payload that the reader knows.
    pub newest: u16,
    /// Longest payload in bytes.
    pub longest: u64,
}

/// A section that does not fit a reader's places, or a place without a section.
#[derive(Debug)]
pub struct Misfit {
    /// Kind of the state.
    pub kind: String,
    /// Which of several of that kind.
    pub instance: String,
    /// What is wrong.
    pub error: FormatError,
}

impl Wanted<'_> {
    fn check(&self, record: &SectionRecord) -> Result<(), FormatError> {
        let Self { kind, instance, newest, longest } = *self;
        if !(1..=newest).contains(&record.version) {
            let found = record.version;
            return Err(PersistError::UnknownVersion { kind, found, newest }.into());
        }
        if record.length > longest {
            let field = format!("section `{kind}` of instance `{instance}`: length");
            let why = format!("{} bytes, at most {longest}", record.length);
            return Err(FormatError::field(STATE_FILE, field, why));
        }
        Ok(())
    }
}

/// What does not fit between the sections on record and the places of a reader: places without a section,
/// sections without a place, unknown versions, payloads that are longer than their kind allows. No payload is
/// read.
pub fn misfits(records: &[SectionRecord], wanted: &[Wanted<'_>]) -> Vec<Misfit> {
    let mut found = Vec::new();
    let mut misfit = |kind: &str, instance: &str, error| {
        found.push(Misfit { kind: kind.to_owned(), instance: instance.to_owned(), error });
    };
    // A manifest has thousands of records at most, a machine some hundred places.
    let mut left: BTreeMap<(&str, &str), &SectionRecord> =
        records.iter().map(|record| ((&*record.kind, &*record.instance), record)).collect();
    for place in wanted {
        let (kind, instance) = (place.kind, place.instance);
        match left.remove(&(kind, instance)) {
            None => {
                let (kind, instance) = (kind.to_owned(), instance.to_owned());
                let error = FormatError::MissingSection { kind, instance };
                misfit(place.kind, place.instance, error);
            }
            Some(record) => {
                if let Err(error) = place.check(record) {
                    misfit(kind, instance, error);
                }
            }
        }
    }
    for (kind, instance) in left.into_keys() {
        let sections = vec![named(kind, instance)];
        misfit(kind, instance, FormatError::UnknownSections { sections });
    }
    found
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

    /// Reads the sections of `snapshot` if they are those of `wanted` and no others, and verifies each one's
    /// digest, and the file's. What does not [fit](misfits) is an error before the first byte is read.
    pub fn read_exactly(snapshot: &Snapshot, wanted: &[Wanted<'_>]) -> Result<Self, FormatError> {
        match misfits(&snapshot.manifest().sections, wanted).into_iter().next() {
            Some(misfit) => Err(misfit.error),
            None => Self::read(snapshot),
        }
    }

    /// Reads all sections of `snapshot`, at most [`MAX_STATE`](crate::manifest::MAX_STATE) bytes, and verifies
    /// each one's digest, and the file's. For those who copy or compare: a machine takes what
    /// [`read_exactly`](Self::read_exactly) gives.
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
                sections: self.left().map(|(kind, instance)| named(kind, instance)).collect(),
            }),
        }
    }
}

fn named(kind: &str, instance: &str) -> String {
    format!("`{kind}` of instance `{instance}`")
}

#[cfg(test)]
mod tests {
    use super::*;

    fn record(kind: &str, instance: &str) -> SectionRecord {
        SectionRecord {
            kind: kind.into(),
            instance: instance.into(),
            version: 2,
            offset: 0,
            length: 100,
            digest: Digest([0; 32]),
        }
    }

    #[test]
    fn what_does_not_fit_is_known_from_the_records_alone() {
        let place = |kind, instance| Wanted { kind, instance, newest: 2, longest: 100 };
        let wanted = [place("gic", "0"), place("vcpu", "0"), place("vcpu", "1")];
        let good = [record("vcpu", "1"), record("gic", "0"), record("vcpu", "0")];
        assert!(misfits(&good, &wanted).is_empty());
        type Change = fn(&mut SectionRecord);
        let cases: [(&str, Change); 4] = [
            ("gic: version 3 cannot be read, the newest that this build knows is 2", |r| {
                r.version = 3
            }),
            ("gic: version 0 cannot be read", |r| r.version = 0),
            ("state: section `gic` of instance `0`: length: 101 bytes, at most 100", |r| {
                r.length = 101
            }),
            ("of instance `0`: length: 18446744073709551615 bytes", |r| r.length = u64::MAX),
        ];
        for (expected, change) in cases {
            let mut records = good.clone();
            change(&mut records[1]);
            let found: Vec<_> =
                misfits(&records, &wanted).iter().map(|m| m.error.to_string()).collect();
            assert!(matches!(&*found, [one] if one.contains(expected)), "{expected}: {found:?}");
        }
        let records = [record("vcpu", "1"), record("gic", "1"), record("vcpu", "0")];
        let found: Vec<_> =
            misfits(&records, &wanted).iter().map(|m| m.error.to_string()).collect();
        let expected = [
            "state: section `gic` of instance `0` is missing",
            "state: nothing takes `gic` of instance `1`",
        ];
        assert_eq!(found, expected);
    }

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
