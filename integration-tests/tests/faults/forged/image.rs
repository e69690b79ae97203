//! CRIU's image files as a forger changes them: records of protobuf of which a few fields are touched.

use prost::encoding::{decode_varint, encode_varint};

/// Two magic numbers.
const HEAD_BYTES: usize = 8;

/// A protobuf message as its fields in their order.
#[derive(Default)]
pub(super) struct Message(Vec<(u32, Value)>);

enum Value {
    Number(u64),
    Bytes(Vec<u8>),
    /// Of 4 or 8 bytes.
    Fixed(Vec<u8>),
}

impl Message {
    pub(super) fn read(mut bytes: &[u8]) -> Self {
        let mut fields = Vec::new();
        while !bytes.is_empty() {
            let key = decode_varint(&mut bytes).expect("a key");
            let mut take = |length: usize| {
                let (taken, rest) = bytes.split_at(length);
                bytes = rest;
                taken.to_vec()
            };
            let value = match key & 7 {
                1 => Value::Fixed(take(8)),
                5 => Value::Fixed(take(4)),
                0 => Value::Number(decode_varint(&mut bytes).expect("a number")),
                2 => {
                    let length = decode_varint(&mut bytes).expect("a length");
                    let (taken, rest) = bytes.split_at(usize::try_from(length).expect("within the file"));
                    bytes = rest;
                    Value::Bytes(taken.to_vec())
                }
                other => panic!("wire type {other}"),
            };
            fields.push((u32::try_from(key >> 3).expect("a field"), value));
        }
        Self(fields)
    }

    pub(super) fn bytes(&self) -> Vec<u8> {
        let mut out = Vec::new();
        for (number, value) in &self.0 {
            let mut key = |kind: u64| encode_varint(u64::from(*number) << 3 | kind, &mut out);
            match value {
                Value::Number(value) => {
                    key(0);
                    encode_varint(*value, &mut out);
                }
                Value::Bytes(bytes) => {
                    key(2);
                    encode_varint(bytes.len() as u64, &mut out);
                    out.extend_from_slice(bytes);
                }
                Value::Fixed(bytes) => {
                    key(if bytes.len() == 8 { 1 } else { 5 });
                    out.extend_from_slice(bytes);
                }
            }
        }
        out
    }

    /// Gives a field these numbers, one after another, whatever it had.
    pub(super) fn numbers(mut self, number: u32, values: &[u64]) -> Self {
        self.0.retain(|(other, _)| *other != number);
        self.0.extend(values.iter().map(|value| (number, Value::Number(*value))));
        self
    }

    pub(super) fn text(mut self, number: u32, text: &str) -> Self {
        self.0.retain(|(other, _)| *other != number);
        self.0.push((number, Value::Bytes(text.as_bytes().to_vec())));
        self
    }

    /// Changes the message in a field.
    pub(super) fn inside(mut self, number: u32, change: impl FnOnce(Self) -> Self) -> Self {
        let found = self.0.iter_mut().find_map(|(other, value)| match value {
            Value::Bytes(bytes) if *other == number => Some(bytes),
            _ => None,
        });
        let bytes = found.unwrap_or_else(|| panic!("no message {number}"));
        *bytes = change(Self::read(bytes)).bytes();
        self
    }
}

/// Changes the first record of an image.
pub(super) fn change(image: &mut Vec<u8>, change: impl FnOnce(Message) -> Message) {
    let length = u32::from_le_bytes(image[HEAD_BYTES..HEAD_BYTES + 4].try_into().expect("a length"));
    let place = HEAD_BYTES + 4..HEAD_BYTES + 4 + length as usize;
    let forged = change(Message::read(&image[place.clone()])).bytes();
    replace(image, place.end, &forged);
}

/// Gives an image this record in the place of its first one.
pub(super) fn set(image: &mut Vec<u8>, record: &[u8]) {
    let length = u32::from_le_bytes(image[HEAD_BYTES..HEAD_BYTES + 4].try_into().expect("a length"));
    replace(image, HEAD_BYTES + 4 + length as usize, record);
}

fn replace(image: &mut Vec<u8>, end: usize, record: &[u8]) {
    let behind = image.split_off(end);
    image.truncate(HEAD_BYTES);
    append(image, record);
    image.extend(behind);
}

/// Adds a record behind the others.
pub(super) fn append(image: &mut Vec<u8>, record: &[u8]) {
    image.extend(u32::try_from(record.len()).expect("a length").to_le_bytes());
    image.extend(record);
}
