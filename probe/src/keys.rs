//! Unknown keys of a probe file: an error that names the nearest known one.
//!
//! serde's own message lists every key it knows; a person who wrote `tolerence` wants the one that was meant.

use toml::{Table, Value};

use crate::error::{Error, Result};

const FILE: &[&str] = &["port", "timeout", "request"];
const REQUEST: &[&str] = &[
    "name",
    "method",
    "path",
    "headers",
    "body",
    "body_json",
    "body_file",
    "port",
    "timeout",
    "status",
    "compare",
    "compare_headers",
];
const COMPARE: &[&str] = &["json", "ignore", "tolerance", "relative"];

/// Refuses any key that the schema of `docs/probe.md` does not have. `file` is how errors call the file.
pub(crate) fn check(root: &Table, file: &str) -> Result<()> {
    known(root, FILE, file)?;
    let Some(Value::Array(requests)) = root.get("request") else { return Ok(()) };
    for (index, request) in requests.iter().enumerate() {
        let Value::Table(request) = request else { continue };
        let place = place(file, index, request.get("name").and_then(Value::as_str));
        known(request, REQUEST, &place)?;
        if let Some(Value::Table(compare)) = request.get("compare") {
            known(compare, COMPARE, &format!("{place}, compare"))?;
        }
    }
    Ok(())
}

/// How an error names a request: by its number and, where it has one, its name.
pub(crate) fn place(file: &str, index: usize, name: Option<&str>) -> String {
    match name {
        Some(name) => format!("{file}, request {} ({name})", index + 1),
        None => format!("{file}, request {}", index + 1),
    }
}

fn known(table: &Table, keys: &'static [&'static str], place: &str) -> Result<()> {
    for key in table.keys() {
        if !keys.contains(&key.as_str()) {
            let nearest = nearest(key, keys);
            return Err(Error::UnknownKey { key: key.clone(), table: place.to_owned(), nearest });
        }
    }
    Ok(())
}

fn nearest(key: &str, keys: &'static [&'static str]) -> &'static str {
    let likeness = |known: &str| strsim::jaro_winkler(key, known);
    keys.iter()
        .copied()
        .max_by(|a, b| likeness(a).total_cmp(&likeness(b)))
        .expect("each list of known keys has entries")
}

#[cfg(test)]
mod tests {
    use super::*;

    fn unknown(text: &str) -> String {
        let table: Table = text.parse().expect("TOML");
        check(&table, "probe file p.toml").expect_err("an unknown key").to_string()
    }

    #[test]
    fn a_misspelt_key_names_the_nearest_known_one() {
        assert_eq!(
            unknown("[[requests]]\npath = '/'"),
            "unknown key \"requests\" in probe file p.toml; the nearest known key is \"request\""
        );
        assert_eq!(
            unknown("[[request]]\nname = 'a'\n[[request]]\nname = 'b'\nmetod = 'GET'"),
            "unknown key \"metod\" in probe file p.toml, request 2 (b); the nearest known key is \"method\""
        );
        assert_eq!(
            unknown("[[request]]\ncompare = { json = ['$'], tolerence = 1 }"),
            "unknown key \"tolerence\" in probe file p.toml, request 1, compare; the nearest known key is \"tolerance\""
        );
    }

    #[test]
    fn header_names_are_free() {
        let table: Table = "[[request]]\nheaders = { x-anything = 'v' }".parse().expect("TOML");
        check(&table, "f").expect("no unknown key");
    }
}
