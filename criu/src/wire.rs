//! Protobuf's wire format, as far as it takes to change one field of a message and leave every other byte as it was.
//!
//! Decoding a message into a struct and encoding it again loses the fields that the struct does not know. CRIU would
//! restore without them and not complain. So patches work on fields: number, wire type, bytes.

/// How a field's value is laid out.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Value<'a> {
    Varint(u64),
    /// Eight or four bytes, not interpreted.
    Fixed,
    /// String, bytes, embedded message or packed numbers.
    Bytes(&'a [u8]),
}

/// One field of a message.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Field<'a> {
    pub(crate) number: u32,
    pub(crate) value: Value<'a>,
    /// Key and value as they stand in the message.
    pub(crate) raw: &'a [u8],
}

/// The fields of a message in their order. Ends after the first error.
pub(crate) struct Fields<'a> {
    rest: &'a [u8],
}

/// The rule that a message breaks.
pub(crate) type Broken = &'static str;

impl<'a> Fields<'a> {
    pub(crate) fn new(message: &'a [u8]) -> Self {
        Self { rest: message }
    }

    fn field(&mut self) -> Result<Field<'a>, Broken> {
        let start = self.rest;
        let mut rest = start;
        let key = varint(&mut rest)?;
        let number = u32::try_from(key >> 3).ok().filter(|&number| number > 0 && number < 1 << 29);
        let number = number.ok_or("a field's number is out of range")?;
        let value = match key & 7 {
            0 => Value::Varint(varint(&mut rest)?),
            1 => fixed(&mut rest, 8)?,
            5 => fixed(&mut rest, 4)?,
            2 => {
                let length =
                    usize::try_from(varint(&mut rest)?).map_err(|_| "a field is longer than memory")?;
                let (bytes, behind) =
                    rest.split_at_checked(length).ok_or("a field is longer than its message")?;
                rest = behind;
                Value::Bytes(bytes)
            }
            _ => return Err("a field's wire type is unknown"),
        };
        self.rest = rest;
        Ok(Field { number, value, raw: &start[..start.len() - rest.len()] })
    }
}

impl<'a> Iterator for Fields<'a> {
    type Item = Result<Field<'a>, Broken>;

    fn next(&mut self) -> Option<Self::Item> {
        if self.rest.is_empty() {
            return None;
        }
        let field = self.field();
        if field.is_err() {
            self.rest = &[];
        }
        Some(field)
    }
}

fn fixed<'a>(rest: &mut &'a [u8], length: usize) -> Result<Value<'a>, Broken> {
    let (_, behind) = rest.split_at_checked(length).ok_or("a field is longer than its message")?;
    *rest = behind;
    Ok(Value::Fixed)
}

fn varint(rest: &mut &[u8]) -> Result<u64, Broken> {
    let mut value = 0_u64;
    for shift in (0..64).step_by(7) {
        let (&byte, behind) = rest.split_first().ok_or("a number ends early")?;
        *rest = behind;
        if shift == 63 && byte > 1 {
            return Err("a number has more than 64 bits");
        }
        value |= u64::from(byte & 0x7f) << shift;
        if byte & 0x80 == 0 {
            return Ok(value);
        }
    }
    Err("a number has more than 64 bits")
}

pub(crate) fn put_varint(out: &mut Vec<u8>, mut value: u64) {
    while value >= 0x80 {
        out.push(value as u8 | 0x80);
        value >>= 7;
    }
    out.push(value as u8);
}

pub(crate) fn put_number(out: &mut Vec<u8>, number: u32, value: u64) {
    put_varint(out, u64::from(number) << 3);
    put_varint(out, value);
}

pub(crate) fn put_bytes(out: &mut Vec<u8>, number: u32, bytes: &[u8]) {
    put_varint(out, u64::from(number) << 3 | 2);
    put_varint(out, bytes.len() as u64);
    out.extend_from_slice(bytes);
}

/// The last value of a numeric field, which is the one that counts.
pub(crate) fn number(message: &[u8], number: u32) -> Result<Option<u64>, Broken> {
    let mut last = None;
    for field in Fields::new(message) {
        let field = field?;
        if let Value::Varint(value) = field.value
            && field.number == number
        {
            last = Some(value);
        }
    }
    Ok(last)
}

/// How often a field occurs.
pub(crate) fn count(message: &[u8], number: u32) -> Result<usize, Broken> {
    let mut seen = 0;
    for field in Fields::new(message) {
        seen += usize::from(field?.number == number);
    }
    Ok(seen)
}

/// The message with numeric fields set, each of them once, behind the others. Everything else stays as it was.
pub(crate) fn with_numbers(message: &[u8], numbers: &[(u32, u64)]) -> Result<Vec<u8>, Broken> {
    let mut out = Vec::with_capacity(message.len() + 16);
    for field in Fields::new(message) {
        let field = field?;
        if !numbers.iter().any(|&(number, _)| number == field.number) {
            out.extend_from_slice(field.raw);
        }
    }
    for &(number, value) in numbers {
        put_number(&mut out, number, value);
    }
    Ok(out)
}

/// The message with embedded messages of one number replaced where `change` gives a new one; `None` if none is.
pub(crate) fn with_messages(
    message: &[u8],
    number: u32,
    mut change: impl FnMut(&[u8]) -> Result<Option<Vec<u8>>, Broken>,
) -> Result<Option<Vec<u8>>, Broken> {
    let mut out = Vec::with_capacity(message.len() + 16);
    let mut changed = false;
    for field in Fields::new(message) {
        let field = field?;
        let new = match field.value {
            Value::Bytes(bytes) if field.number == number => change(bytes)?,
            _ => None,
        };
        match new {
            Some(new) => {
                put_bytes(&mut out, number, &new);
                changed = true;
            }
            None => out.extend_from_slice(field.raw),
        }
    }
    Ok(changed.then_some(out))
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn a_field_is_set_and_the_unknown_ones_survive() {
        let mut message = Vec::new();
        put_number(&mut message, 7, 300);
        put_bytes(&mut message, 99, b"unknown");
        // Fixed-width fields of both sizes.
        message.extend_from_slice(&[9 << 3 | 1, 1, 2, 3, 4, 5, 6, 7, 8, 10 << 3 | 5, 1, 2, 3, 4]);
        put_number(&mut message, 7, 301);
        let rest = message[3..message.len() - 3].to_vec();
        assert_eq!(number(&message, 7), Ok(Some(301)), "the last one counts");
        let changed = with_numbers(&message, &[(7, 5)]).expect("a message");
        let mut expected = rest;
        put_number(&mut expected, 7, 5);
        assert_eq!(changed, expected);
        assert_eq!(count(&message, 7), Ok(2));
        let none = with_messages(&message, 99, |_| Ok(None)).expect("a message");
        assert_eq!(none, None);
        let other = with_messages(&message, 99, |bytes| Ok(Some([bytes, b"!"].concat()))).expect("a message");
        let mut text = Vec::new();
        put_bytes(&mut text, 99, b"unknown!");
        let other = other.expect("changed");
        assert_eq!(&other[3..3 + text.len()], text);
        assert_eq!(other.len(), message.len() + 1);
    }

    #[test]
    fn broken_messages_are_told_apart() {
        let broken = |bytes: &[u8]| number(bytes, 1).expect_err("broken");
        assert_eq!(broken(&[0x80]), "a number ends early");
        assert_eq!(
            broken(&[8, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 2]),
            "a number has more than 64 bits"
        );
        assert_eq!(broken(&[10, 5, 1]), "a field is longer than its message");
        assert_eq!(broken(&[11]), "a field's wire type is unknown");
        assert_eq!(broken(&[0]), "a field's number is out of range");
        assert_eq!(broken(&[13, 1]), "a field is longer than its message");
    }

    proptest! {
        #[test]
        fn what_is_read_is_the_message(bytes in proptest::collection::vec(any::<u8>(), 0..100)) {
            let mut joined = Vec::new();
            let mut whole = true;
            for field in Fields::new(&bytes) {
                match field {
                    Ok(field) => joined.extend_from_slice(field.raw),
                    Err(_) => whole = false,
                }
            }
            prop_assert!(bytes.starts_with(&joined));
            prop_assert_eq!(whole, joined.len() == bytes.len());
        }

        #[test]
        fn numbers_come_back(field in 1_u32..1 << 29, value in any::<u64>()) {
            let mut message = Vec::new();
            put_number(&mut message, field, value);
            prop_assert_eq!(number(&message, field), Ok(Some(value)));
        }
    }
}
