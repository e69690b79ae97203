//! Counts what is in a protobuf message before it is decoded.
//!
//! An empty message inside another takes two bytes on the wire and a hundred in memory, so a bound on the length of a
//! stored object is none on the memory that decoding it takes. Counting walks over the bytes and takes no memory.

use prost::encoding::{DecodeContext, WireType, decode_key, decode_varint, skip_field};

use crate::error::Damage;

/// How often a field may occur.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Allowed {
    /// Its number.
    pub(crate) tag: u32,
    /// What it holds, for the error.
    pub(crate) what: &'static str,
    pub(crate) limit: u64,
    /// A field within it that is counted over all its occurrences.
    pub(crate) inner: Option<&'static Allowed>,
}

/// Checks that no field of `bytes` occurs more often than `allowed` says.
pub(crate) fn check(bytes: &[u8], allowed: &[Allowed]) -> Result<(), Damage> {
    for field in allowed {
        let mut counts = (0, 0);
        for payload in (Payloads { rest: bytes, tag: field.tag }) {
            let payload = payload?;
            counts.0 += 1;
            bound(field, counts.0)?;
            let Some(inner) = field.inner else { continue };
            for nested in (Payloads { rest: payload, tag: inner.tag }) {
                nested?;
                counts.1 += 1;
                bound(inner, counts.1)?;
            }
        }
    }
    Ok(())
}

fn bound(field: &Allowed, found: u64) -> Result<(), Damage> {
    if found <= field.limit {
        return Ok(());
    }
    Err(Damage::Bound { what: field.what, found, limit: field.limit })
}

/// The contents of every occurrence of a length-delimited field.
struct Payloads<'a> {
    rest: &'a [u8],
    tag: u32,
}

impl<'a> Payloads<'a> {
    fn read(&mut self) -> Result<Option<&'a [u8]>, Damage> {
        while !self.rest.is_empty() {
            let (tag, wire) = decode_key(&mut self.rest)?;
            if wire != WireType::LengthDelimited {
                skip_field(wire, tag, &mut self.rest, DecodeContext::default())?;
                continue;
            }
            let length = decode_varint(&mut self.rest)?;
            let here = self.rest;
            let taken = usize::try_from(length).ok().and_then(|length| here.split_at_checked(length));
            let Some((payload, rest)) = taken else {
                let (what, limit) = ("length of a field", here.len() as u64);
                return Err(Damage::Bound { what, found: length, limit });
            };
            self.rest = rest;
            if tag == self.tag {
                return Ok(Some(payload));
            }
        }
        Ok(None)
    }
}

impl<'a> Iterator for Payloads<'a> {
    type Item = Result<&'a [u8], Damage>;

    fn next(&mut self) -> Option<Self::Item> {
        let item = self.read().transpose();
        if matches!(item, Some(Err(_))) {
            self.rest = &[];
        }
        item
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const INNER: Allowed = Allowed { tag: 3, what: "inner", limit: 4, inner: None };
    const OUTER: Allowed = Allowed { tag: 2, what: "outer", limit: 3, inner: Some(&INNER) };

    /// A field of this tag that holds `payload`.
    fn field(tag: u8, payload: &[u8]) -> Vec<u8> {
        [&[tag << 3 | 2, payload.len() as u8], payload].concat()
    }

    #[test]
    fn fields_are_counted_and_others_are_passed_over() {
        let two = [field(3, b""), field(3, b"x")].concat();
        // A varint of tag 1, then two outer fields with two inner ones each.
        let good = [vec![8, 150, 1], field(2, &two), field(7, b"other"), field(2, &two)].concat();
        assert!(check(&good, &[OUTER]).is_ok());
        let much_inner = [good.clone(), field(2, &field(3, b""))].concat();
        assert!(matches!(check(&much_inner, &[OUTER]), Err(Damage::Bound { what: "inner", found: 5, .. })));
        let much_outer = [good, field(2, b""), field(2, b"")].concat();
        assert!(matches!(check(&much_outer, &[OUTER]), Err(Damage::Bound { what: "outer", found: 4, .. })));
    }

    #[test]
    fn a_length_beyond_the_end_is_damage() {
        assert!(matches!(check(&[18, 5, 0], &[OUTER]), Err(Damage::Bound { what: "length of a field", .. })));
        assert!(matches!(check(&[18, 255], &[OUTER]), Err(Damage::Protobuf(_))));
    }
}
