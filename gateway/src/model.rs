//! The field `model` of a JSON body, which may be cut off: it is looked for in the beginning only.

use std::cell::RefCell;
use std::fmt;

use serde::de::{Deserializer as _, IgnoredAny, MapAccess, Visitor};

/// How much of a body is looked at.
pub(crate) const LOOKED_AT_BYTES: usize = 64 << 10;

/// The field `model` of the object that begins here.
pub(crate) fn model(beginning: &[u8]) -> Option<String> {
    let found = RefCell::new(None);
    let mut reader = serde_json::Deserializer::from_slice(beginning);
    // An error at the end says that the rest is missing, which does not matter any more.
    let _ = reader.deserialize_map(Fields(&found));
    found.into_inner()
}

struct Fields<'a>(&'a RefCell<Option<String>>);

impl<'de> Visitor<'de> for Fields<'_> {
    type Value = ();

    fn expecting(&self, to: &mut fmt::Formatter<'_>) -> fmt::Result {
        to.write_str("an object")
    }

    fn visit_map<M: MapAccess<'de>>(self, mut map: M) -> Result<(), M::Error> {
        while let Some(key) = map.next_key::<String>()? {
            if key == "model" {
                *self.0.borrow_mut() = Some(map.next_value::<String>()?);
                return Ok(());
            }
            map.next_value::<IgnoredAny>()?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_model_is_found_wherever_it_stands_at_the_top() {
        for (text, found) in [
            (r#"{"model":"llama","messages":[]}"#, Some("llama")),
            (r#"{"messages":[{"model":"no"}],"model":"llama"}"#, Some("llama")),
            (r#"{"messages":[{"model":"no"}]}"#, None),
            (r#"{"model":"llama","messages":[{"content":"cut o"#, Some("llama")),
            (r#"{"messages":[{"content":"cut o"#, None),
            (r#"{"model":7}"#, None),
            (r#"["model"]"#, None),
            ("not JSON", None),
            ("", None),
        ] {
            assert_eq!(model(text.as_bytes()).as_deref(), found, "{text}");
        }
    }
}
