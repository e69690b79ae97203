//! A replica as a test sees it: a name, a port of this machine, and the verbs that act on it.

use std::io;
use std::time::Duration;

use serde_json::Value;

use crate::command::{Output, Rewarm};
use crate::http::{self, Response};
use crate::world::World;

/// A replica that runs, or ran.
#[derive(Debug)]
pub struct Replica<'w> {
    world: &'w World,
    name: String,
    port: u16,
}

impl<'w> Replica<'w> {
    /// The replica that a successful `rewarm run` made.
    ///
    /// # Panics
    ///
    /// When the output does not tell the published port.
    #[must_use]
    pub fn of_run(world: &'w World, name: String, inner: u16, output: &Output) -> Self {
        let port = published(&output.json(), inner)
            .unwrap_or_else(|| panic!("no port {inner} published by\n{output}"));
        Self { world, name, port }
    }

    /// One that a command is still making: it has no port yet that could be asked.
    #[must_use]
    pub fn in_the_making(world: &'w World, name: String) -> Self {
        Self { world, name, port: 0 }
    }

    /// The replicas that `rewarm restore` made; those that failed are left out.
    ///
    /// # Panics
    ///
    /// When the output does not tell them.
    #[must_use]
    pub fn of_restore(world: &'w World, inner: u16, output: &Output) -> Vec<Self> {
        let lines = output.json_lines();
        let json =
            lines.iter().find(|line| line["replicas"].is_array()).cloned().unwrap_or_else(|| output.json());
        let list = json["replicas"].as_array().cloned().unwrap_or_else(|| vec![json.clone()]);
        let replica = |value: &Value| {
            let name = value["name"].as_str().unwrap_or_else(|| panic!("no name in\n{output}")).to_owned();
            let port =
                published(value, inner).unwrap_or_else(|| panic!("no port {inner} published by\n{output}"));
            Self { world, name, port }
        };
        list.iter().filter(|value| value["error"].is_null()).map(replica).collect()
    }

    /// The whole name.
    #[must_use]
    pub fn name(&self) -> &str {
        &self.name
    }

    /// The name without the world's id and the number of a clone.
    #[must_use]
    pub fn short(&self) -> &str {
        let end = self.name.find(self.world.id()).expect("every name has the world's id");
        self.name[..end].trim_end_matches('-')
    }

    /// The port of this machine that leads to the server.
    #[must_use]
    pub fn port(&self) -> u16 {
        self.port
    }

    /// The world in which it lives.
    #[must_use]
    pub fn world(&self) -> &'w World {
        self.world
    }

    /// Asks the server.
    ///
    /// # Errors
    ///
    /// As [`http::request`].
    pub fn ask(&self, method: &str, path: &str, body: Option<&str>) -> io::Result<Response> {
        http::request(self.port, method, path, body)
    }

    /// Asks the server, which must answer with 200 and JSON.
    ///
    /// # Panics
    ///
    /// When it does not.
    #[must_use]
    pub fn json(&self, path: &str) -> Value {
        let response =
            http::get(self.port, path).unwrap_or_else(|error| panic!("{}: GET {path}: {error}", self.name));
        assert_eq!(response.status, 200, "{}: GET {path}: {}", self.name, response.text());
        response.json()
    }

    /// A call of `rewarm exec` with `command`.
    #[must_use]
    pub fn exec(&self, command: &[&str]) -> Rewarm {
        self.world.rewarm().args(["exec", &self.name, "--"]).args(command)
    }

    /// Runs `script` with `sh -c` in the replica and gives its output without the last line break.
    ///
    /// # Panics
    ///
    /// When it fails.
    pub fn sh(&self, script: &str) -> String {
        self.exec(&["sh", "-c", script]).ok().stdout.trim_end().to_owned()
    }

    /// The identity that Rewarm gave it.
    ///
    /// # Panics
    ///
    /// When it has none.
    #[must_use]
    pub fn identity(&self) -> Value {
        let text = self.sh("cat /run/rewarm/identity.json");
        serde_json::from_str(&text)
            .unwrap_or_else(|error| panic!("{}: identity {text:?}: {error}", self.name))
    }

    /// Its entry in `rewarm ps --all`.
    #[must_use]
    pub fn entry(&self) -> Option<Value> {
        let list = self.world.rewarm_json().args(["ps", "--all"]).ok();
        entries(&list).into_iter().find(|entry| entry["name"] == self.name.as_str())
    }

    /// Stops it.
    ///
    /// # Panics
    ///
    /// When that fails.
    pub fn stop(&self) -> Output {
        self.world
            .rewarm()
            .args(["stop", &self.name, "--timeout", "300ms"])
            .timeout(Duration::from_secs(30))
            .ok()
    }

    /// Stops it and frees its name.
    ///
    /// # Panics
    ///
    /// When one of the two fails.
    pub fn remove(&self) {
        self.stop();
        self.world.rewarm().args(["rm", &self.name]).ok();
    }
}

/// The entries of `rewarm ps --json`.
#[must_use]
pub fn entries(output: &Output) -> Vec<Value> {
    match output.json() {
        Value::Array(list) => list,
        Value::Object(object) => {
            object.get("replicas").and_then(Value::as_array).cloned().unwrap_or_default()
        }
        _ => Vec::new(),
    }
}

/// The names in `rewarm ps --json`.
#[must_use]
pub fn names(output: &Output) -> Vec<String> {
    entries(output).iter().filter_map(|entry| entry["name"].as_str()).map(str::to_owned).collect()
}

/// The port of this machine that leads to the port `inner` of a replica.
fn published(value: &Value, inner: u16) -> Option<u16> {
    let ports = value["publish"].as_array().or_else(|| value["published"].as_array())?;
    ports.iter().find_map(|entry| {
        let to = entry["port"].as_u64().or_else(|| entry["replica_port"].as_u64())?;
        let from = entry["host_port"].as_u64()?;
        (to == u64::from(inner)).then(|| u16::try_from(from).ok())?
    })
}
