//! JSON as servers write it: RFC 8259 plus the bare `NaN`, `Infinity` and `-Infinity` of Python's encoder.
//!
//! serde_json has no place for the three, so each becomes a string that starts with a NUL, which no real text does, and
//! is shown and compared as the number it stands for.

use serde_json::Value;

const WORDS: [(&str, &str, &str); 3] = [
    ("-Infinity", "\"\\u0000-Infinity\"", "\0-Infinity"),
    ("Infinity", "\"\\u0000Infinity\"", "\0Infinity"),
    ("NaN", "\"\\u0000NaN\"", "\0NaN"),
];

/// Parses an answer.
pub(crate) fn parse(bytes: &[u8]) -> Result<Value, serde_json::Error> {
    match serde_json::from_slice(bytes) {
        Ok(value) => Ok(value),
        // Only an answer that is not strict JSON pays for the second look; its own error is the one to report.
        Err(error) => match mark_words(bytes) {
            Some(marked) => serde_json::from_slice(&marked),
            None => Err(error),
        },
    }
}

/// Replaces the bare words outside strings; nothing when there is none.
fn mark_words(bytes: &[u8]) -> Option<Vec<u8>> {
    let (mut marked, mut changed) = (Vec::with_capacity(bytes.len() + 64), false);
    let (mut at, mut in_string) = (0, false);
    while at < bytes.len() {
        let rest = &bytes[at..];
        match rest[0] {
            b'\\' if in_string => {
                marked.extend_from_slice(&rest[..rest.len().min(2)]);
                at += 2;
                continue;
            }
            b'"' => in_string = !in_string,
            b'-' | b'I' | b'N' if !in_string => {
                if let Some((word, text, _)) =
                    WORDS.iter().find(|(word, ..)| rest.starts_with(word.as_bytes()))
                {
                    marked.extend_from_slice(text.as_bytes());
                    at += word.len();
                    changed = true;
                    continue;
                }
            }
            _ => {}
        }
        marked.push(rest[0]);
        at += 1;
    }
    changed.then_some(marked)
}

/// A value as an error shows it, cut to a length that fits a line.
pub(crate) fn show(value: &Value) -> String {
    let text = match value {
        Value::String(text) => WORDS
            .iter()
            .find(|(.., mark)| mark == text)
            .map_or_else(|| value.to_string(), |(word, ..)| (*word).to_owned()),
        other => other.to_string(),
    };
    cut(&text)
}

/// Cuts a text to [`crate::limits::SHOWN_CHARS_MAX`].
pub(crate) fn cut(text: &str) -> String {
    match text.char_indices().nth(crate::limits::SHOWN_CHARS_MAX) {
        Some((end, _)) => format!("{}... ({} bytes)", &text[..end], text.len()),
        None => text.to_owned(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bare_words_are_numbers_outside_strings_only() {
        let value =
            parse(br#"{"a": [NaN, -Infinity, Infinity], "NaN": "a \" NaN", "b": -1}"#).expect("parses");
        let shown: Vec<String> = value["a"].as_array().expect("array").iter().map(show).collect();
        assert_eq!(shown, ["NaN", "-Infinity", "Infinity"]);
        assert_eq!(value["NaN"], "a \" NaN");
        assert_eq!(value["b"], -1);
    }

    #[test]
    fn what_is_no_json_at_all_is_refused() {
        for text in ["", "{", "NaNN", "<html>", "\"\\"] {
            assert!(parse(text.as_bytes()).is_err(), "{text}");
        }
    }

    #[test]
    fn a_long_value_is_cut_between_characters() {
        let shown = show(&Value::String("é".repeat(500)));
        assert!(shown.ends_with("... (1002 bytes)"), "{shown}");
    }
}
