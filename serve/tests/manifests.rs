//! The files of `examples/kubernetes` are read as those read them who will: the pool by the configuration, the trigger by
//! the scaler.

use std::collections::HashMap;
use std::path::{Path, PathBuf};

use rewarm_serve::config::Config;
use rewarm_serve::keda;
use rewarm_serve::keda::proto::ScaledObjectRef;
use rewarm_serve::keda::proto::external_scaler_client::ExternalScalerClient;
use rewarm_serve::scripted::Scripted;
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
