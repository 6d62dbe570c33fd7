//! Where each field of a value lies in its payload: [`codec`](crate::codec)'s encoding, walked by serde.

use serde::{
    Serialize, Serializer,
    ser::{
        SerializeMap, SerializeSeq, SerializeStruct, SerializeStructVariant, SerializeTuple,
        SerializeTupleStruct, SerializeTupleVariant,
    },
};

/// A field of a value, or one of the numbers that the encoding puts before fields.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Field {
    /// How it is reached: `transport.queues[0].num`.
    pub path: String,
    /// Offset in the payload, in bytes.
    pub offset: usize,
    /// Width in bytes: 1, 2, 4, 8 or 16.
    pub width: usize,
    /// What it is.
    pub role: Role,
}

/// What a field is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Role {
    /// A number; a bool is one of a byte.
    Number,
    /// The number of elements, or of bytes of a text, that follow.
    Length,
    /// Which variant of an enum or an option follows.
    Tag,
}

impl Field {
    /// The payload with other values of this field: the least and the greatest, those next to them, those of
    /// signed numbers, and the two next to the value that it has.
    pub fn extremes(&self, payload: &[u8]) -> Vec<(u128, Vec<u8>)> {
        let (at, width) = (self.offset, self.width);
        let mut bytes = [0; 16];
        bytes[..width].copy_from_slice(&payload[at..at + width]);
        let now = u128::from_le_bytes(bytes);
        let most = u128::MAX >> (128 - 8 * width);
        let half = most / 2;
        let mut values = vec![0, 1, half, half + 1, most - 1, most];
        values.extend([now.wrapping_sub(1) & most, now.wrapping_add(1) & most]);
        values.sort_unstable();
        values.dedup();
        values.retain(|value| *value != now);
        let with = |value: u128| {
            let mut changed = payload.to_vec();
            changed[at..at + width].copy_from_slice(&value.to_le_bytes()[..width]);
            (value, changed)
        };
        values.into_iter().map(with).collect()
    }
}

/// All fields of `value`, in the order of its payload.
pub fn fields<T: Serialize + ?Sized>(value: &T) -> Vec<Field> {
    let mut walk = Walk { path: String::new(), offset: 0, fields: Vec::new() };
    value.serialize(&mut walk).expect("plain values");
    walk.fields
}

/// How many bytes [`fields`] cover, with those of texts and byte strings.
pub fn length<T: Serialize + ?Sized>(value: &T) -> usize {
    let mut walk = Walk { path: String::new(), offset: 0, fields: Vec::new() };
    value.serialize(&mut walk).expect("plain values");
    walk.offset
}

struct Walk {
    path: String,
    offset: usize,
    fields: Vec<Field>,
}

#[derive(Debug, thiserror::Error)]
#[error("{0}")]
struct Failed(String);

impl serde::ser::Error for Failed {
    fn custom<T: std::fmt::Display>(message: T) -> Self {
        Self(message.to_string())
    }
}

impl Walk {
    fn put(&mut self, width: usize, role: Role) -> Result<(), Failed> {
        self.fields.push(Field { path: self.path.clone(), offset: self.offset, width, role });
        self.offset += width;
        Ok(())
    }

    /// Goes on inside of the element called `name`.
    fn inside<T: Serialize + ?Sized>(&mut self, name: &str, value: &T) -> Result<(), Failed> {
        let outside = self.path.len();
        if !self.path.is_empty() && !name.starts_with('[') {
            self.path.push('.');
        }
        self.path.push_str(name);
        value.serialize(&mut *self)?;
        self.path.truncate(outside);
        Ok(())
    }
}

/// The elements of something, by number or by name.
struct Elements<'a> {
    walk: &'a mut Walk,
    next: usize,
}

impl Elements<'_> {
    fn element<T: Serialize + ?Sized>(&mut self, value: &T) -> Result<(), Failed> {
        let name = format!("[{}]", self.next);
        self.next += 1;
        self.walk.inside(&name, value)
    }
}

macro_rules! numbers {
    ($($name:ident: $type:ty),*) => {$(
        fn $name(self, _: $type) -> Result<(), Failed> {
            self.put(size_of::<$type>(), Role::Number)
        }
    )*};
}

impl<'a> Serializer for &'a mut Walk {
    type Ok = ();
    type Error = Failed;
    type SerializeSeq = Elements<'a>;
    type SerializeTuple = Elements<'a>;
    type SerializeTupleStruct = Elements<'a>;
    type SerializeTupleVariant = Elements<'a>;
    type SerializeMap = Elements<'a>;
    type SerializeStruct = Elements<'a>;
    type SerializeStructVariant = Elements<'a>;

    numbers! {
        serialize_bool: bool,
        serialize_i8: i8, serialize_i16: i16, serialize_i32: i32, serialize_i64: i64,
        serialize_i128: i128,
        serialize_u8: u8, serialize_u16: u16, serialize_u32: u32, serialize_u64: u64,
        serialize_u128: u128,
        serialize_f32: f32, serialize_f64: f64
    }

    fn is_human_readable(&self) -> bool {
        false
    }

    fn serialize_char(self, _: char) -> Result<(), Failed> {
        Err(Failed("a char has no width of its own".to_owned()))
    }

    fn serialize_str(self, text: &str) -> Result<(), Failed> {
        self.serialize_bytes(text.as_bytes())
    }

    fn serialize_bytes(self, bytes: &[u8]) -> Result<(), Failed> {
        self.put(8, Role::Length)?;
        self.offset += bytes.len();
        Ok(())
    }

    fn serialize_none(self) -> Result<(), Failed> {
        self.put(1, Role::Tag)
    }

    fn serialize_some<T: Serialize + ?Sized>(self, value: &T) -> Result<(), Failed> {
        self.put(1, Role::Tag)?;
        value.serialize(self)
    }

    fn serialize_unit(self) -> Result<(), Failed> {
        Ok(())
    }

    fn serialize_unit_struct(self, _: &'static str) -> Result<(), Failed> {
        Ok(())
    }

    fn serialize_unit_variant(
        self,
        _: &'static str,
        _: u32,
        _: &'static str,
    ) -> Result<(), Failed> {
        self.put(4, Role::Tag)
    }

    fn serialize_newtype_struct<T: Serialize + ?Sized>(
        self,
        _: &'static str,
        value: &T,
    ) -> Result<(), Failed> {
        value.serialize(self)
    }

    fn serialize_newtype_variant<T: Serialize + ?Sized>(
        self,
        _: &'static str,
        _: u32,
        _: &'static str,
        value: &T,
    ) -> Result<(), Failed> {
        self.put(4, Role::Tag)?;
        value.serialize(self)
    }

    fn serialize_seq(self, _: Option<usize>) -> Result<Elements<'a>, Failed> {
        self.put(8, Role::Length)?;
        Ok(Elements { walk: self, next: 0 })
    }

    fn serialize_tuple(self, _: usize) -> Result<Elements<'a>, Failed> {
        Ok(Elements { walk: self, next: 0 })
    }

    fn serialize_tuple_struct(self, _: &'static str, _: usize) -> Result<Elements<'a>, Failed> {
        Ok(Elements { walk: self, next: 0 })
    }

    fn serialize_tuple_variant(
        self,
        _: &'static str,
        _: u32,
        _: &'static str,
        _: usize,
    ) -> Result<Elements<'a>, Failed> {
        self.put(4, Role::Tag)?;
        Ok(Elements { walk: self, next: 0 })
    }

    fn serialize_map(self, _: Option<usize>) -> Result<Elements<'a>, Failed> {
        self.put(8, Role::Length)?;
        Ok(Elements { walk: self, next: 0 })
    }

    fn serialize_struct(self, _: &'static str, _: usize) -> Result<Elements<'a>, Failed> {
        Ok(Elements { walk: self, next: 0 })
    }

    fn serialize_struct_variant(
        self,
        _: &'static str,
        _: u32,
        _: &'static str,
        _: usize,
    ) -> Result<Elements<'a>, Failed> {
        self.put(4, Role::Tag)?;
        Ok(Elements { walk: self, next: 0 })
    }
}

macro_rules! elements {
    ($($of:ident: $method:ident),*) => {$(
        impl $of for Elements<'_> {
            type Ok = ();
            type Error = Failed;

            fn $method<T: Serialize + ?Sized>(&mut self, value: &T) -> Result<(), Failed> {
                self.element(value)
            }

            fn end(self) -> Result<(), Failed> {
                Ok(())
            }
        }
    )*};
}

elements! {
    SerializeSeq: serialize_element,
    SerializeTuple: serialize_element,
    SerializeTupleStruct: serialize_field,
    SerializeTupleVariant: serialize_field
}

macro_rules! named_elements {
    ($($of:ident),*) => {$(
        impl $of for Elements<'_> {
            type Ok = ();
            type Error = Failed;

            fn serialize_field<T: Serialize + ?Sized>(
                &mut self,
                name: &'static str,
                value: &T,
            ) -> Result<(), Failed> {
                self.walk.inside(name, value)
            }

            fn end(self) -> Result<(), Failed> {
                Ok(())
            }
        }
    )*};
}

named_elements!(SerializeStruct, SerializeStructVariant);

impl SerializeMap for Elements<'_> {
    type Ok = ();
    type Error = Failed;

    fn serialize_key<T: Serialize + ?Sized>(&mut self, key: &T) -> Result<(), Failed> {
        self.element(key)
    }

    fn serialize_value<T: Serialize + ?Sized>(&mut self, value: &T) -> Result<(), Failed> {
        self.element(value)
    }

    fn end(self) -> Result<(), Failed> {
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::codec;

    #[derive(Serialize)]
    struct Inner {
        flag: bool,
        wide: u128,
    }

    #[derive(Serialize)]
    enum Choice {
        Plain,
        Filled { low: i16 },
    }

    #[derive(Serialize)]
    struct Outer {
        byte: u8,
        text: String,
        inner: Vec<Inner>,
        none: Option<u32>,
        some: Option<u32>,
        array: [u16; 2],
        choices: (Choice, Choice),
    }

    #[test]
    fn fields_are_found_where_the_encoding_puts_them() {
        let value = Outer {
            byte: 7,
            text: "abc".into(),
            inner: vec![Inner { flag: true, wide: 3 }],
            none: None,
            some: Some(0x0102_0304),
            array: [5, 6],
            choices: (Choice::Plain, Choice::Filled { low: -1 }),
        };
        let payload = codec::encode("outer", &value).unwrap();
        assert_eq!(length(&value), payload.len());
        let fields = fields(&value);
        let found: Vec<_> = fields.iter().map(|f| (&*f.path, f.offset, f.width)).collect();
        let expected = [
            ("byte", 0, 1),
            ("text", 1, 8),
            ("inner", 12, 8),
            ("inner[0].flag", 20, 1),
            ("inner[0].wide", 21, 16),
            ("none", 37, 1),
            ("some", 38, 1),
            ("some", 39, 4),
            ("array[0]", 43, 2),
            ("array[1]", 45, 2),
            ("choices[0]", 47, 4),
            ("choices[1]", 51, 4),
            ("choices[1].low", 55, 2),
        ];
        assert_eq!(found, expected);
        let some = &fields[7];
        let extremes = some.extremes(&payload);
        let values: Vec<u128> = extremes.iter().map(|(value, _)| *value).collect();
        let half = 0x7fff_ffff;
        let most = 0xffff_ffff;
        assert_eq!(values, [0, 1, 0x0102_0303, 0x0102_0305, half, half + 1, most - 1, most]);
        for (value, changed) in extremes {
            assert_eq!(changed[39..43], (value as u32).to_le_bytes());
            assert_eq!((&changed[..39], &changed[43..]), (&payload[..39], &payload[43..]));
        }
    }
}
