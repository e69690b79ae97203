//! A client that calls as KEDA does: `StreamIsActive` and `StreamMetricSpec` opened once, `GetMetricSpec` for the
//! horizontal pod autoscaler, then `GetMetrics` and `IsActive` at each poll. KEDA itself does not run here.

use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use rewarm_serve::keda;
use rewarm_serve::keda::proto::external_scaler_client::ExternalScalerClient;
use rewarm_serve::keda::proto::{GetMetricSpecResponse, GetMetricsRequest, ScaledObjectRef};
use rewarm_serve::scripted::Scripted;
use rewarm_serve::status::Notice;
use tokio::net::TcpListener;
use tokio::sync::oneshot;
use tokio::task::JoinHandle;
use tonic::transport::{Certificate, Channel, ClientTlsConfig, Endpoint};
use tonic::{Code, Streaming};

/// Longer than a busy machine ever needs; reached only where nothing comes.
const PATIENCE: Duration = Duration::from_secs(60);

/// A scaler over scripted pools.
struct Scaler {
    pools: Arc<Scripted>,
    address: SocketAddr,
    stop: oneshot::Sender<()>,
    served: JoinHandle<Result<(), tonic::transport::Error>>,
}

async fn scaler(names: &[&str], tls: Option<(String, String)>) -> Scaler {
    let pools = Scripted::new(names, None);
    let listener = TcpListener::bind("127.0.0.1:0").await.expect("bound");
    let address = listener.local_addr().expect("an address");
    let (stop, stopped) = oneshot::channel::<()>();
    let handle = pools.handle();
    let served = tokio::spawn(async move {
        let stop = async {
            let _ = stopped.await;
        };
        keda::serve(listener, tls.as_ref(), handle, stop).await
    });
    Scaler { pools, address, stop, served }
}

impl Scaler {
    async fn client(&self) -> ExternalScalerClient<Channel> {
        let endpoint = Endpoint::from_shared(format!("http://{}", self.address)).expect("a URL");
        ExternalScalerClient::new(endpoint.connect().await.expect("connected"))
    }

    /// Ends it, which open streams must not hinder.
    async fn end(self) {
        self.stop.send(()).expect("it runs");
        let ended = tokio::time::timeout(PATIENCE, self.served).await.expect("it ends");
        ended.expect("no panic").expect("no error");
    }
}

fn trigger(metadata: &[(&str, &str)]) -> ScaledObjectRef {
    // KEDA sends all of the trigger's metadata along, its own keys too.
    let own = ("scalerAddress", "rewarm.serving:9090");
    let all = metadata.iter().chain([&own]).map(|(key, value)| ((*key).to_owned(), (*value).to_owned()));
    ScaledObjectRef {
        name: "llama".to_owned(),
        namespace: "serving".to_owned(),
        scaler_metadata: all.collect(),
    }
}

fn asked(trigger: &ScaledObjectRef, metric: &str) -> GetMetricsRequest {
    GetMetricsRequest { scaled_object_ref: Some(trigger.clone()), metric_name: metric.to_owned() }
}

async fn next<T>(stream: &mut Streaming<T>) -> T {
    let message = tokio::time::timeout(PATIENCE, stream.message()).await.expect("something comes");
    message.expect("no error").expect("a message")
}

#[tokio::test]
async fn keda_s_calls_in_keda_s_order() {
    let scaler = scaler(&["llama", "bert"], None).await;
    let mut client = scaler.client().await;
    let trigger = trigger(&[("pool", "llama")]);

    // A ScaledObject is made: the push stream is opened, and the metrics are asked for.
    let mut active = client.stream_is_active(trigger.clone()).await.expect("a stream").into_inner();
    let mut specs = client.stream_metric_spec(trigger.clone()).await.expect("a stream").into_inner();
    assert!(!next(&mut active).await.result);
    let pushed = next(&mut specs).await;
    let spec = client.get_metric_spec(trigger.clone()).await.expect("specs").into_inner();
    assert_eq!(pushed, spec);
    let [metric] = spec.metric_specs.as_slice() else { panic!("{spec:?}") };
    assert_eq!(metric.metric_name, "desired_replicas");
    assert_eq!((metric.target_size, metric.target_size_float), (1, 1.0));

    // A poll while nobody asks.
    let values = client.get_metrics(asked(&trigger, "desired_replicas")).await.expect("values").into_inner();
    let [value] = values.metric_values.as_slice() else { panic!("{values:?}") };
    assert_eq!((value.metric_value, value.metric_value_float), (0, 0.0));
    assert!(!client.is_active(trigger.clone()).await.expect("an answer").into_inner().result);

    // A request is held in another pool, then in this one. The status says nothing of either, so `true` can come from
    // the notice alone, and not from the look at the status that is taken each second.
    scaler.pools.tell(Notice::FirstHeld { pool: "bert".to_owned() });
    scaler.pools.tell(Notice::FirstHeld { pool: "llama".to_owned() });
    assert!(next(&mut active).await.result);

    // The autoscaler's queries: GetMetrics, then IsActive.
    scaler.pools.change_pool("llama", |pool| (pool.desired, pool.in_flight, pool.held) = (3, 11, 4));
    for (name, expected) in [("desired_replicas", 3), ("", 3), ("in_flight", 15)] {
        let values = client.get_metrics(asked(&trigger, name)).await.expect("values").into_inner();
        let [value] = values.metric_values.as_slice() else { panic!("{values:?}") };
        assert_eq!((value.metric_value, value.metric_value_float), (expected, expected as f64), "{name}");
    }
    assert!(client.is_active(trigger.clone()).await.expect("an answer").into_inner().result);
    while !next(&mut active).await.result {}

    // Idle again.
    scaler.pools.change_pool("llama", |pool| (pool.desired, pool.in_flight, pool.held) = (0, 0, 0));
    while next(&mut active).await.result {}
    assert!(!client.is_active(trigger).await.expect("an answer").into_inner().result);
    scaler.end().await;
}

#[tokio::test]
async fn a_changed_limit_is_a_changed_spec() {
    let scaler = scaler(&["llama"], None).await;
    let mut client = scaler.client().await;
    let trigger = trigger(&[("metric", "in_flight")]);
    let mut specs = client.stream_metric_spec(trigger.clone()).await.expect("a stream").into_inner();
    let target = |spec: &GetMetricSpecResponse| spec.metric_specs[0].target_size_float;
    assert_eq!(target(&next(&mut specs).await), 6.0);
    scaler.pools.change_pool("llama", |pool| pool.limits.target_concurrency = 4);
    assert_eq!(target(&next(&mut specs).await), 4.0);
    assert_eq!(target(client.get_metric_spec(trigger).await.expect("specs").get_ref()), 4.0);
    scaler.end().await;
}

#[tokio::test]
async fn triggers_that_make_no_sense_are_refused_with_what_would() {
    let scaler = scaler(&["llama", "bert"], None).await;
    let mut client = scaler.client().await;
    type Case = (&'static [(&'static str, &'static str)], Code, &'static str);
    let cases: [Case; 6] = [
        (&[], Code::InvalidArgument, "there are 2 pools: llama, bert"),
        (&[("pool", "lama")], Code::NotFound, "no pool is called \"lama\"; there are: llama, bert"),
        (
            &[("pool", "bert"), ("metric", "rps")],
            Code::InvalidArgument,
            "expected desired_replicas or in_flight",
        ),
        (
            &[("pool", "bert"), ("metric", "in_flight"), ("target", "0")],
            Code::InvalidArgument,
            "a number above 0",
        ),
        (
            &[("pool", "bert"), ("metric", "in_flight"), ("target", "NaN")],
            Code::InvalidArgument,
            "a number above 0",
        ),
        (&[("pool", "bert"), ("target", "2")], Code::InvalidArgument, "only with metric in_flight"),
    ];
    for (metadata, code, text) in cases {
        let trigger = trigger(metadata);
        let errors = [
            client.is_active(trigger.clone()).await.expect_err("refused"),
            client.get_metric_spec(trigger.clone()).await.expect_err("refused"),
            client.get_metrics(asked(&trigger, "")).await.expect_err("refused"),
            client.stream_is_active(trigger.clone()).await.expect_err("refused"),
            client.stream_metric_spec(trigger).await.expect_err("refused"),
        ];
        for error in errors {
            assert_eq!(error.code(), code, "{metadata:?}: {error}");
            assert!(error.message().contains(text), "{metadata:?}: {error}");
        }
    }
    let good = trigger(&[("pool", "bert")]);
    let unknown = client.get_metrics(asked(&good, "rps")).await.expect_err("refused");
    assert_eq!(unknown.code(), Code::InvalidArgument);
    scaler.end().await;
}

/// A stream whose pool is taken out of the file ends with that reason, and KEDA opens it again until it is back.
#[tokio::test]
async fn a_pool_that_goes_ends_its_streams() {
    let scaler = scaler(&["llama"], None).await;
    let mut client = scaler.client().await;
    let trigger = trigger(&[("pool", "llama")]);
    let mut active = client.stream_is_active(trigger).await.expect("a stream").into_inner();
    assert!(!next(&mut active).await.result);
    scaler.pools.change_pool("llama", |pool| pool.in_flight = 1);
    assert!(next(&mut active).await.result);
    scaler.pools.change(|status| status.pools.clear());
    let error = loop {
        match active.message().await {
            Ok(message) => assert!(message.is_some(), "it ended without a reason"),
            Err(error) => break error,
        }
    };
    assert_eq!(error.code(), Code::NotFound, "{error}");
    scaler.end().await;
}

#[tokio::test]
async fn with_tls_only_who_trusts_the_certificate_is_answered() {
    let certificate = || rcgen::generate_simple_self_signed(["localhost".to_owned()]).expect("a certificate");
    let (own, other) = (certificate(), certificate());
    let tls = (own.cert.pem(), own.signing_key.serialize_pem());
    let scaler = scaler(&["llama"], Some(tls)).await;

    let connect = |scheme: &str, pem: Option<String>| {
        let url = format!("{scheme}://localhost:{}", scaler.address.port());
        let mut endpoint = Endpoint::from_shared(url).expect("a URL");
        if let Some(pem) = pem {
            let config = ClientTlsConfig::new().ca_certificate(Certificate::from_pem(pem));
            endpoint = endpoint.tls_config(config).expect("a certificate");
        }
        async move { ExternalScalerClient::new(endpoint.connect_lazy()).is_active(trigger(&[])).await }
    };
    let active = connect("https", Some(own.cert.pem())).await.expect("an answer");
    assert!(!active.into_inner().result);
    connect("https", Some(other.cert.pem())).await.expect_err("another certificate");
    connect("http", None).await.expect_err("no TLS");
    scaler.end().await;
}

#[tokio::test]
async fn a_certificate_that_is_none_is_refused() {
    let listener = TcpListener::bind("127.0.0.1:0").await.expect("bound");
    let tls = ("none".to_owned(), "none".to_owned());
    let handle = Scripted::new(&["llama"], None).handle();
    keda::serve(listener, Some(&tls), handle, std::future::pending()).await.expect_err("no certificate");
}
