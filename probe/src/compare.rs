//! Which part of an answer counts, and whether two answers are equal in it.

use serde::{Deserialize, Serialize};
use serde_json::Value;
use serde_json_path::{JsonPath, PathElement};

use crate::json::show;
use crate::limits::SELECTED_VALUES_MAX;

/// Which part of an answer is compared. The status is compared always.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Compare {
    /// The status alone.
    Status,
    /// Every byte of the body.
    Body,
    /// Values that JSON paths select from the body.
    #[serde(untagged)]
    Json(Selection),
}

/// Values of a JSON body, and how far numbers among them may differ.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Selection {
    /// JSON paths (RFC 9535), each of which must select something.
    pub json: Vec<String>,
    /// JSON paths of what is taken out before: identifiers, times.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub ignore: Vec<String>,
    /// Numbers may differ by so much.
    #[serde(default)]
    pub tolerance: f64,
    /// Numbers may differ by so much of the expected one.
    #[serde(default)]
    pub relative: f64,
}

/// One selected value and where it was.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Located {
    /// Its path, such as `$.data[0].embedding`.
    pub path: String,
    /// The value.
    pub value: Value,
}

/// The first point in which an answer differs from the recorded one.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error, Serialize)]
#[error("answer of request {request:?} differs: {path} is {seen}, expected {expected}")]
pub struct Difference {
    /// Name of the request.
    pub request: String,
    /// `status`, `header NAME`, `body at byte N` or the path of a JSON value.
    pub path: String,
    /// The value that the restored server gave.
    pub seen: String,
    /// The recorded value, with the tolerance where there is one.
    pub expected: String,
}

/// A point of difference before the request's name is known.
#[derive(Debug, PartialEq)]
pub(crate) struct Point {
    pub(crate) path: String,
    pub(crate) seen: String,
    pub(crate) expected: String,
}

impl Point {
    pub(crate) fn of(self, request: &str) -> Difference {
        Difference { request: request.to_owned(), path: self.path, seen: self.seen, expected: self.expected }
    }
}

impl Selection {
    /// Selects from `root`; says which path selects nothing, or is no JSON path.
    pub(crate) fn select(&self, mut root: Value) -> Result<Vec<Located>, String> {
        for path in &self.ignore {
            let places: Vec<Vec<Step>> = located(path, &root)?.into_iter().map(|(steps, _)| steps).collect();
            for place in &places {
                remove(&mut root, place);
            }
        }
        let mut selected = Vec::new();
        for path in &self.json {
            let found = located(path, &root)?;
            if found.is_empty() {
                return Err(format!("path {path} selects nothing"));
            }
            if selected.len() + found.len() > SELECTED_VALUES_MAX {
                return Err(format!(
                    "path {path} selects {} values, at most {SELECTED_VALUES_MAX}",
                    found.len()
                ));
            }
            selected.extend(
                found
                    .into_iter()
                    .map(|(steps, value)| Located { path: written(&steps), value: value.clone() }),
            );
        }
        Ok(selected)
    }

    /// The first difference between two selections, in the order of the recorded one.
    pub(crate) fn differ(&self, seen: &[Located], expected: &[Located]) -> Option<Point> {
        let mut seen = seen.iter();
        for wanted in expected {
            let Some(found) = seen.next() else {
                return Some(point(&wanted.path, "absent", show(&wanted.value)));
            };
            if found.path != wanted.path {
                return Some(point(
                    &wanted.path,
                    format!("absent, {} stands there", found.path),
                    show(&wanted.value),
                ));
            }
            if let Some(point) = self.differ_value(&wanted.path, &found.value, &wanted.value) {
                return Some(point);
            }
        }
        seen.next().map(|extra| point(&extra.path, show(&extra.value), "absent"))
    }

    fn differ_value(&self, path: &str, seen: &Value, expected: &Value) -> Option<Point> {
        match (seen, expected) {
            (Value::Array(a), Value::Array(b)) => {
                if a.len() != b.len() {
                    return Some(point(path, format!("{} values", a.len()), format!("{} values", b.len())));
                }
                (a.iter().zip(b).enumerate())
                    .find_map(|(i, (a, b))| self.differ_value(&format!("{path}[{i}]"), a, b))
            }
            (Value::Object(a), Value::Object(b)) => {
                let missing = b.iter().find(|(key, _)| !a.contains_key(*key));
                if let Some((key, value)) = missing {
                    return Some(point(&member(path, key), "absent", show(value)));
                }
                let extra = a.iter().find(|(key, _)| !b.contains_key(*key));
                if let Some((key, value)) = extra {
                    return Some(point(&member(path, key), show(value), "absent"));
                }
                b.iter().find_map(|(key, value)| self.differ_value(&member(path, key), &a[key], value))
            }
            (Value::Number(a), Value::Number(b)) if self.near(a, b) => None,
            (Value::Number(_), Value::Number(_)) => {
                Some(point(path, show(seen), format!("{}{}", show(expected), self.allowance())))
            }
            _ if seen == expected => None,
            _ => Some(point(path, show(seen), show(expected))),
        }
    }

    fn near(&self, seen: &serde_json::Number, expected: &serde_json::Number) -> bool {
        if seen == expected {
            return true;
        }
        // Integers beyond 2^53 are equal as f64 although they differ, so two integers are compared as such.
        if let (Some(a), Some(b)) = (seen.as_i128(), expected.as_i128()) {
            return within(a.abs_diff(b) as f64, self.tolerance, self.relative * (b as f64).abs());
        }
        match (seen.as_f64(), expected.as_f64()) {
            (Some(a), Some(b)) => within((a - b).abs(), self.tolerance, self.relative * b.abs()),
            _ => false,
        }
    }

    fn allowance(&self) -> String {
        match (self.tolerance > 0.0, self.relative > 0.0) {
            (false, false) => String::new(),
            (true, false) => format!(" (+/- {})", self.tolerance),
            (false, true) => format!(" (+/- {} of it)", self.relative),
            (true, true) => format!(" (+/- {} or {} of it)", self.tolerance, self.relative),
        }
    }
}

fn within(distance: f64, absolute: f64, relative: f64) -> bool {
    distance <= absolute.max(relative)
}

fn point(path: &str, seen: impl Into<String>, expected: impl Into<String>) -> Point {
    Point { path: path.to_owned(), seen: seen.into(), expected: expected.into() }
}

/// One step from the root of a JSON value.
#[derive(Debug, Clone, PartialEq)]
enum Step {
    Name(String),
    Index(usize),
}

fn located<'a>(path: &str, root: &'a Value) -> Result<Vec<(Vec<Step>, &'a Value)>, String> {
    let parsed = JsonPath::parse(path).map_err(|error| format!("{path} is no JSON path: {error}"))?;
    let nodes = parsed.query_located(root);
    let steps = |element: &PathElement<'_>| match element {
        PathElement::Name(name) => Step::Name((*name).to_owned()),
        PathElement::Index(index) => Step::Index(*index),
    };
    Ok(nodes.iter().map(|node| (node.location().iter().map(steps).collect(), node.node())).collect())
}

fn remove(root: &mut Value, steps: &[Step]) {
    let Some((last, parents)) = steps.split_last() else {
        *root = Value::Null;
        return;
    };
    let mut at = root;
    for step in parents {
        let next = match step {
            Step::Name(name) => at.get_mut(name),
            Step::Index(index) => at.get_mut(index),
        };
        let Some(next) = next else { return };
        at = next;
    }
    match (at, last) {
        (Value::Object(members), Step::Name(name)) => drop(members.remove(name)),
        // Elements keep their places, so that other paths and the paths in messages still mean what they say.
        (Value::Array(elements), Step::Index(index)) if *index < elements.len() => {
            elements[*index] = Value::Null
        }
        _ => {}
    }
}

fn written(steps: &[Step]) -> String {
    steps.iter().fold("$".to_owned(), |path, step| match step {
        Step::Name(name) => member(&path, name),
        Step::Index(index) => format!("{path}[{index}]"),
    })
}

fn member(path: &str, key: &str) -> String {
    let plain = !key.is_empty()
        && !key.starts_with(|c: char| c.is_ascii_digit())
        && key.chars().all(|c| c.is_ascii_alphanumeric() || c == '_');
    if plain { format!("{path}.{key}") } else { format!("{path}[{key:?}]") }
}

/// Whether `path` is a JSON path that this crate understands.
pub(crate) fn check_path(path: &str) -> Result<(), String> {
    JsonPath::parse(path).map(drop).map_err(|error| error.to_string())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::json::parse;

    fn selection(json: &[&str], ignore: &[&str], tolerance: f64, relative: f64) -> Selection {
        let own = |list: &[&str]| list.iter().map(|s| (*s).to_owned()).collect();
        Selection { json: own(json), ignore: own(ignore), tolerance, relative }
    }

    fn differ(selection: &Selection, seen: &str, expected: &str) -> Option<String> {
        let select = |text: &str| selection.select(parse(text.as_bytes()).expect("JSON")).expect("selects");
        selection
            .differ(&select(seen), &select(expected))
            .map(|p| format!("{} {} {}", p.path, p.seen, p.expected))
    }

    #[test]
    fn numbers_may_differ_by_the_tolerance_and_not_more() {
        let exact = selection(&["$.v"], &[], 0.0, 0.0);
        assert_eq!(differ(&exact, r#"{"v":[1.0,2]}"#, r#"{"v":[1,2.0]}"#), None);
        assert_eq!(
            differ(&exact, r#"{"v":[1,2.0000001]}"#, r#"{"v":[1,2]}"#).as_deref(),
            Some("$.v[1] 2.0000001 2")
        );
        let near = selection(&["$.v"], &[], 1e-5, 0.0);
        assert_eq!(differ(&near, r#"{"v":[0.500009]}"#, r#"{"v":[0.5]}"#), None);
        assert_eq!(
            differ(&near, r#"{"v":[0.51]}"#, r#"{"v":[0.5]}"#).as_deref(),
            Some("$.v[0] 0.51 0.5 (+/- 0.00001)")
        );
        let relative = selection(&["$.v"], &[], 0.0, 0.01);
        assert_eq!(differ(&relative, r#"{"v":100.9}"#, r#"{"v":100}"#), None);
        assert!(differ(&relative, r#"{"v":101.1}"#, r#"{"v":100}"#).is_some());
        assert!(differ(&relative, r#"{"v":0.001}"#, r#"{"v":0}"#).is_some());
    }

    #[test]
    fn integers_beyond_the_mantissa_of_a_float_are_told_apart() {
        let exact = selection(&["$"], &[], 0.0, 0.0);
        assert!(differ(&exact, "9007199254740993", "9007199254740992").is_some());
        assert_eq!(differ(&exact, "18446744073709551615", "18446744073709551615"), None);
        assert_eq!(differ(&selection(&["$"], &[], 1.0, 0.0), "9007199254740993", "9007199254740992"), None);
    }

    #[test]
    fn nan_equals_nan_and_nothing_else() {
        let near = selection(&["$"], &[], 1e9, 1.0);
        assert_eq!(differ(&near, "[NaN, -Infinity]", "[NaN, -Infinity]"), None);
        assert_eq!(differ(&near, "[1.5]", "[NaN]").as_deref(), Some("$[0] 1.5 NaN"));
        assert_eq!(differ(&near, "[NaN]", "[1.5]").as_deref(), Some("$[0] NaN 1.5"));
        assert_eq!(differ(&near, "[Infinity]", "[-Infinity]").as_deref(), Some("$[0] Infinity -Infinity"));
    }

    #[test]
    fn a_missing_an_extra_and_another_value_are_each_named() {
        let whole = selection(&["$"], &[], 0.0, 0.0);
        assert_eq!(
            differ(&whole, r#"{"a":1}"#, r#"{"a":1,"b c":"x"}"#).as_deref(),
            Some("$[\"b c\"] absent \"x\"")
        );
        assert_eq!(differ(&whole, r#"{"a":1,"b":2}"#, r#"{"a":1}"#).as_deref(), Some("$.b 2 absent"));
        assert_eq!(
            differ(&whole, r#"{"a":[1]}"#, r#"{"a":[1,2]}"#).as_deref(),
            Some("$.a 1 values 2 values")
        );
        assert_eq!(differ(&whole, r#"{"a":"1"}"#, r#"{"a":1}"#).as_deref(), Some("$.a \"1\" 1"));
        let each = selection(&["$.d[*].t"], &[], 0.0, 0.0);
        assert_eq!(
            differ(&each, r#"{"d":[{"t":1}]}"#, r#"{"d":[{"t":1},{"t":2}]}"#).as_deref(),
            Some("$.d[1].t absent 2")
        );
        assert_eq!(
            differ(&each, r#"{"d":[{"t":1},{"t":2}]}"#, r#"{"d":[{"t":1}]}"#).as_deref(),
            Some("$.d[1].t 2 absent")
        );
    }

    #[test]
    fn what_is_ignored_does_not_count() {
        let whole = selection(&["$"], &["$.id", "$.choices[*].created", "$.list[0]"], 0.0, 0.0);
        let seen = r#"{"id":"a","choices":[{"created":1,"text":"x"}],"list":[1,2]}"#;
        let expected = r#"{"choices":[{"created":2,"text":"x"}],"list":[9,2]}"#;
        assert_eq!(differ(&whole, seen, expected), None);
        assert_eq!(
            differ(&whole, r#"{"choices":[{"text":"y"}],"list":[0,2]}"#, expected).as_deref(),
            Some("$.choices[0].text \"y\" \"x\"")
        );
    }

    #[test]
    fn a_path_that_selects_nothing_is_an_error() {
        let none = selection(&["$.absent"], &[], 0.0, 0.0);
        assert_eq!(none.select(Value::Null).expect_err("nothing"), "path $.absent selects nothing");
        assert!(selection(&["not a path"], &[], 0.0, 0.0).select(Value::Null).is_err());
    }
}
