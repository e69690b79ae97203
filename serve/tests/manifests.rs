//! The files of `examples/kubernetes` are read as those read them who will: the pool by the configuration, the trigger by
//! the scaler. What one file says of another is compared.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::path::{Path, PathBuf};

use rewarm_serve::config::Config;
use rewarm_serve::keda;
use rewarm_serve::keda::proto::ScaledObjectRef;
use rewarm_serve::keda::proto::external_scaler_client::ExternalScalerClient;
use rewarm_serve::scripted::Scripted;
use serde::Deserialize;
use serde_yaml_ng::Value;
use tokio::net::TcpListener;
use tonic::transport::Endpoint;

fn example(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../examples/kubernetes").join(name)
}

/// The lines below the last `metadata:`, which is the trigger's.
fn trigger(manifest: &str) -> HashMap<String, String> {
    let (_, below) = manifest.rsplit_once("metadata:\n").expect("a trigger");
    let lines = below.lines().map(str::trim).filter(|line| !line.starts_with('#'));
    lines
        .map(|line| line.split_once(": ").unwrap_or_else(|| panic!("{line}")))
        .map(|(key, value)| (key.to_owned(), value.trim_matches('"').to_owned()))
        .collect()
}

#[tokio::test]
async fn the_manifests_are_understood_by_what_they_are_for() {
    let config = Config::read(&example("pool.toml")).expect("a good file");
    let [pool] = config.pools.as_slice() else { panic!("one pool") };
    let manifest = std::fs::read_to_string(example("scaledobject.yaml")).expect("readable");
    let metadata = trigger(&manifest);
    assert_eq!(metadata.get("pool"), Some(&pool.name));
    let port = config.serve.keda.expect("a scaler").port();
    assert!(metadata["scalerAddress"].ends_with(&format!(":{port}")), "{metadata:?}");
    let slots = f64::from(pool.concurrency * pool.max_replicas);

    let listener = TcpListener::bind("127.0.0.1:0").await.expect("bound");
    let url = format!("http://{}", listener.local_addr().expect("an address"));
    let handle = Scripted::new(&["bert", &pool.name], None).handle();
    tokio::spawn(async { keda::serve(listener, None, handle, std::future::pending()).await });
    let channel = Endpoint::from_shared(url).expect("a URL").connect().await.expect("connected");
    let asked = ScaledObjectRef {
        name: "llama".to_owned(),
        namespace: "serving".to_owned(),
        scaler_metadata: metadata,
    };
    let spec =
        ExternalScalerClient::new(channel).get_metric_spec(asked).await.expect("understood").into_inner();
    let [metric] = spec.metric_specs.as_slice() else { panic!("{spec:?}") };
    assert_eq!((metric.metric_name.as_str(), metric.target_size_float), ("in_flight", 0.75 * slots));

    let machines = std::fs::read_to_string(example("machines.yaml")).expect("readable");
    for port in [pool.listen.port(), port, config.serve.admin.expect("an address").port()] {
        assert!(machines.contains(&format!("containerPort: {port}}}")), "{port}");
    }
}

fn text(name: &str) -> String {
    std::fs::read_to_string(example(name)).unwrap_or_else(|error| panic!("{name}: {error}"))
}

/// The documents of a manifest.
fn documents(name: &str) -> Vec<Value> {
    let text = text(name);
    let documents = serde_yaml_ng::Deserializer::from_str(&text).map(Value::deserialize);
    documents.map(|document| document.unwrap_or_else(|error| panic!("{name}: {error}"))).collect()
}

/// A document without a second one.
fn document(name: &str) -> Value {
    let mut documents = documents(name);
    assert_eq!(documents.len(), 1, "{name}");
    documents.remove(0)
}

fn word(value: &Value) -> &str {
    value.as_str().unwrap_or_else(|| panic!("{value:?} is no word"))
}

/// The items of a list, by one of their keys.
fn by<'a>(list: &'a Value, key: &str) -> BTreeMap<&'a str, &'a Value> {
    let items = list.as_sequence().unwrap_or_else(|| panic!("{list:?} is no list"));
    items.iter().map(|item| (word(&item[key]), item)).collect()
}

#[test]
fn what_the_manifests_say_of_each_other_is_there() {
    let kustomization = document("kustomization.yaml");
    let listed: BTreeSet<String> = kustomization["resources"]
        .as_sequence()
        .expect("a list")
        .iter()
        .map(|name| word(name).to_owned())
        .collect();
    let folder = std::fs::read_dir(example("")).expect("readable");
    let names = folder.map(|entry| entry.expect("readable").file_name().into_string().expect("UTF-8"));
    let manifests = names.filter(|name| name.ends_with(".yaml") && name != "kustomization.yaml");
    assert_eq!(listed, manifests.collect(), "kustomization.yaml lists all others");

    let machines = documents("machines.yaml");
    let [deployment, service] = machines.as_slice() else {
        panic!("two documents, and not {}", machines.len())
    };
    let pod = &deployment["spec"]["template"];
    let labels = &pod["metadata"]["labels"];
    let container = &pod["spec"]["containers"][0];
    let ports = by(&container["ports"], "name");
    for served in service["spec"]["ports"].as_sequence().expect("a list") {
        assert!(ports.contains_key(word(&served["targetPort"])), "{served:?}");
    }
    assert!(ports.contains_key(word(&container["readinessProbe"]["tcpSocket"]["port"])));

    let scaled = document("scaledobject.yaml");
    let target = &scaled["spec"]["scaleTargetRef"];
    for key in ["apiVersion", "kind"] {
        assert_eq!(target[key], deployment[key]);
    }
    assert_eq!(target["name"], deployment["metadata"]["name"]);
    let address = word(&scaled["spec"]["triggers"][0]["metadata"]["scalerAddress"]);
    let host = format!("{}.{}", word(&service["metadata"]["name"]), word(&kustomization["namespace"]));
    let served = service["spec"]["ports"].as_sequence().expect("a list");
    let keda = served.iter().find(|port| word(&port["name"]) == "keda").expect("the scaler's");
    assert_eq!(address, format!("{host}:{}", keda["port"].as_u64().expect("a number")));

    let monitor = document("podmonitor.yaml");
    let endpoints = monitor["spec"]["podMetricsEndpoints"].as_sequence().expect("a list");
    let paths: Vec<&str> = endpoints.iter().map(|endpoint| word(&endpoint["path"])).collect();
    assert_eq!(paths, ["/metrics", "/metrics/replicas"]);
    for selected in [&deployment["spec"]["selector"], &monitor["spec"]["selector"]] {
        assert_eq!(&selected["matchLabels"], labels);
    }
    assert_eq!(&service["spec"]["selector"], labels);

    // What is mounted where the pool's file and the command look for it.
    let (volumes, mounts) = (by(&pod["spec"]["volumes"], "name"), by(&container["volumeMounts"], "name"));
    assert_eq!(volumes.keys().collect::<Vec<_>>(), mounts.keys().collect::<Vec<_>>());
    let path = |mount: &str, file: &str| Path::new(word(&mounts[mount]["mountPath"])).join(file);
    let generated = &kustomization["configMapGenerator"][0];
    assert_eq!(generated["name"], volumes["pool"]["configMap"]["name"]);
    let command = container["command"].as_sequence().expect("a list");
    let command: Vec<&Path> = command.iter().map(|word| Path::new(self::word(word))).collect();
    assert_eq!(command.last().copied(), Some(path("pool", word(&generated["files"][0])).as_path()));
    assert_eq!(command[2], path("state", ""));
    let config = Config::read(&example(word(&generated["files"][0]))).expect("a good file");
    for endpoint in endpoints {
        assert_eq!(
            ports[word(&endpoint["port"])]["containerPort"].as_u64(),
            config.serve.admin.map(|at| at.port().into())
        );
        let token = &endpoint["authorization"]["credentials"];
        assert_eq!(token["name"], volumes["admin"]["secret"]["secretName"]);
        assert_eq!(config.serve.admin_token, Some(path("admin", word(&token["key"]))));
    }
    let grace = pod["spec"]["terminationGracePeriodSeconds"].as_u64().expect("seconds");
    assert!(
        grace > config.serve.drain.as_secs(),
        "{grace} s, and requests may take {:?}",
        config.serve.drain
    );
}
