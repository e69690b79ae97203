//! `rewarm key`

use rewarm_store::{KeyFolder, ListedKey};
use serde::Serialize;

use crate::args::{Global, Key, KeyVerb};
use crate::config;
use crate::failure::Cause;
use crate::render::{Output, table};

#[derive(Serialize)]
struct Keys {
    keys: Vec<Row>,
}

#[derive(Serialize)]
struct Row {
    name: String,
    public: String,
    /// Whether this machine can sign with it.
    secret: bool,
}

impl From<ListedKey> for Row {
    fn from(key: ListedKey) -> Self {
        Self { name: key.name, public: key.public.to_string(), secret: key.secret }
    }
}

pub(crate) fn run(args: &Key, global: &Global) -> Result<u8, Cause> {
    let output = Output::new(global);
    let folder = |given: &Option<std::path::PathBuf>| match given {
        Some(path) => KeyFolder::new(path),
        None => config::key_folder(),
    };
    match &args.verb {
        KeyVerb::New(new) => {
            let made = Row::from(folder(&new.dir).make(&new.name)?);
            output.answer(&made, |made| format!("{} {}\n", made.public, made.name))?;
        }
        KeyVerb::List(list) => {
            let keys = folder(&list.dir).list()?.into_iter().map(Row::from).collect();
            output.answer(&Keys { keys }, text)?;
        }
    }
    Ok(0)
}

fn text(keys: &Keys) -> String {
    let rows = keys.keys.iter().map(|key| {
        let purpose = if key.secret { "sign, check" } else { "check" };
        vec![key.name.clone(), purpose.to_owned(), key.public.clone()]
    });
    table(&["NAME", "FOR", "PUBLIC KEY"], rows)
}
