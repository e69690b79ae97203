//! Files of `rewarm serve` that are good, and mistakes in them.

use super::*;

fn read(text: &str) -> Result<Config> {
    Config::parse(text, Path::new("pool.toml"))
}

fn refused(text: &str) -> String {
    let error = read(text).expect_err("a mistake");
    let source = std::error::Error::source(&error).map_or(String::new(), |source| format!(": {source}"));
    format!("{error}{source}")
}

const POOL: &str = "[[pool]]\nname = 'llama'\nsnapshot = 's3://models/llama@prod'\nlisten = '0.0.0.0:8000'\n";

#[test]
fn what_is_not_said_has_its_default() {
    let config = read(POOL).expect("good");
    let pool = &config.pools[0];
    assert_eq!((pool.concurrency, pool.min_replicas, pool.max_replicas, pool.warm), (8, 0, 16, 0));
    assert_eq!(pool.queue, QueueConfig { max: 1000, deadline: Duration::from_secs(30) });
    assert_eq!((pool.routing, &pool.cold, pool.retry), (Routing::Busiest, &Cold::Recorded, true));
    assert!(pool.prefetch && !pool.capture);
    assert_eq!((config.serve.on_exit, config.serve.memory, &config.serve.otlp), (OnExit::Stop, None, &None));
    assert_eq!(config.serve.body_timeout, Duration::from_secs(60));
    assert_eq!(config.serve.admin, "127.0.0.1:9901".parse().ok());
}

#[test]
fn everything_can_be_said() {
    let text = format!(
        "{POOL}port = 8001\nprotocol = 'h2c'\nconcurrency = 4\ntarget_concurrency = 3\nmin_replicas = 1\nmax_replicas = 2\nwarm = 2\n\
         queue = {{ max = 10, deadline = '3s' }}\ntarget_wait = '2s'\nstart_timeout = '5s'\nrouting = 'least-in-flight'\n\
         affinity = 'x-session'\nretry = false\nanswer_timeout = '9s'\ndrain = '10s'\ncold = ['python3', 'server.py']\n\
         replica_memory = '1.5GiB'\nfollow = '0s'\nprefetch = false\ncapture = true\npolicy = {{ kind = 'kpa', stable_window = '30s' }}\n\
         match = {{ host = 'A.example', path_prefix = '/v1', header = 'X-Team: red', model = 'llama' }}\n\
         [serve]\nadmin = false\nkeda = '127.0.0.1:9090'\notlp = 'http://127.0.0.1:4318'\non_exit = 'keep'\nmemory = '20GiB'\ncache = '4GiB'\n\
         tls = {{ cert = 'c.pem', key = 'k.pem' }}\nadmin_token = 'token'\nheader_timeout = '5s'\nbody_timeout = '20s'\nbody_max = '1MiB'\n\
         connections_max = 100\ndrain = '1m'\n"
    );
    let config = read(&text).expect("good");
    let pool = &config.pools[0];
    assert_eq!((pool.port, pool.concurrency, pool.target_concurrency), (Some(8001), 4, 3));
    assert_eq!(
        (pool.drain, pool.answer_timeout),
        (Some(Duration::from_secs(10)), Some(Duration::from_secs(9)))
    );
    assert_eq!(pool.protocol, Protocol::H2c);
    assert_eq!(pool.matching.host.as_deref(), Some("a.example"));
    assert_eq!(pool.matching.header, Some(("x-team".to_owned(), "red".to_owned())));
    assert_eq!((pool.replica_memory, pool.policy.spec.name.as_str()), (Some(3 << 29), "kpa"));
    assert!(pool.capture && !pool.prefetch);
    assert_eq!(
        (config.serve.admin, config.serve.memory),
        (None, Some(Budget { replicas: 16 << 30, cache: 4 << 30 }))
    );
    assert_eq!(config.serve.body_timeout, Duration::from_secs(20));
    assert_eq!(config.serve.otlp.as_deref(), Some("http://127.0.0.1:4318/"));
}

#[test]
fn a_quarter_of_the_memory_is_for_decoded_snapshots_unless_the_file_says_otherwise() {
    let memory = |said: &str| read(&format!("{POOL}[serve]\n{said}")).expect("good").serve.memory;
    assert_eq!(memory("memory = '20GiB'"), Some(Budget { replicas: 15 << 30, cache: 5 << 30 }));
    assert_eq!(memory("memory = '20GiB'\ncache = false"), Some(Budget { replicas: 20 << 30, cache: 0 }));
}

#[test]
fn mistakes_name_what_is_nearest_or_expected() {
    for (text, told) in [
        (
            format!("{POOL}concurency = 4"),
            "unknown key \"concurency\" in configuration pool.toml, pool llama; the nearest known key is \"concurrency\"",
        ),
        (
            format!("{POOL}queue = {{ maximum = 4 }}"),
            "unknown key \"maximum\" in configuration pool.toml, pool llama, queue; the nearest known key is \"max\"",
        ),
        (
            format!("{POOL}[serv]\nadmin = '127.0.0.1:1'"),
            "unknown key \"serv\" in configuration pool.toml; the nearest known key is \"serve\"",
        ),
        (
            format!("{POOL}policy = {{ kind = 'kpa', stable_windw = '60s' }}"),
            "unknown key \"stable_windw\" in configuration pool.toml, pool llama, policy kpa; the nearest known key is \"stable_window\"",
        ),
        (
            format!("{POOL}policy = 'knative'"),
            "unknown policy \"knative\"; the nearest known policy is \"kpa\"",
        ),
        (
            format!("{POOL}max_replicas = 0"),
            "max_replicas of configuration pool.toml, pool llama is 0, expected a whole number from 1 to 100000",
        ),
        (
            format!("{POOL}cold = false\ncapture = true"),
            "capture of configuration pool.toml, pool llama is true, expected false where cold is false: what is captured is started cold",
        ),
        (
            format!("{POOL}min_replicas = 17"),
            "min_replicas of configuration pool.toml, pool llama is 17, expected at most max_replicas, which is 16",
        ),
        (
            format!("{POOL}target_wait = 1"),
            "target_wait of configuration pool.toml, pool llama is 1, expected a time with its unit, such as \"500ms\" or \"30s\"",
        ),
        (
            format!("{POOL}affinity = 'my session'"),
            "affinity of configuration pool.toml, pool llama is my session, expected the name of a header",
        ),
        (
            "[[pool]]\nname = 'a'\nlisten = '0.0.0.0:1'".to_owned(),
            "snapshot of configuration pool.toml, pool a is missing, expected a snapshot such as \"s3://models/llama@prod\"",
        ),
        (
            "[[pool]]\nsnapshot = 'a'".to_owned(),
            "name of configuration pool.toml, pool number 1 is missing, expected letters, digits and dashes, at most 40",
        ),
        (
            format!("{POOL}{POOL}"),
            "name of configuration pool.toml is llama twice, expected a name of its own for each pool",
        ),
        (
            format!("{POOL}{}", POOL.replace("'llama'", "'other'")),
            "listen of configuration pool.toml is 0.0.0.0:8000 for both llama and other, expected at most one pool without match at each address",
        ),
        (
            format!("{POOL}[serve]\nadmin = '0.0.0.0:9901'"),
            "admin of configuration pool.toml is 0.0.0.0:9901, expected an address of this machine alone (127.0.0.1), or a file in admin_token",
        ),
        (
            format!("{POOL}[serve]\notlp = 'https://collector.example'"),
            "otlp of configuration pool.toml, serve is https://collector.example, expected the address of a collector such as \"http://127.0.0.1:4318\"",
        ),
        (
            format!("{POOL}[serve]\ncache = '1KiB'"),
            "cache of configuration pool.toml, serve is 1024 bytes, expected memory beside it, of which it is a part",
        ),
        (
            format!("{POOL}[serve]\nmemory = '1KiB'\ncache = '2KiB'"),
            "cache of configuration pool.toml, serve is 2048 bytes, expected less than memory, which is 1024 bytes",
        ),
        (String::new(), "pool of configuration pool.toml is missing, expected at least one [[pool]]"),
    ] {
        assert_eq!(refused(&text), told, "{text}");
    }
}
