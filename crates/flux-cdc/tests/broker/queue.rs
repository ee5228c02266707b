//! A queue at the broker, as a consumer has it.

use std::collections::BTreeSet;
use std::time::Duration;

use bytes::Bytes;
use flux_proto::event::{Event, Op, Record, read_json_body};
use lapin::options::{
    BasicAckOptions, BasicConsumeOptions, ExchangeDeclareOptions, ExchangeDeleteOptions,
    QueueBindOptions, QueueDeclareOptions,
};
use lapin::types::{AMQPValue, FieldTable};
use lapin::{Channel, Connection, ConnectionProperties, Consumer, ExchangeKind};
use tokio::time::timeout;
use tokio_stream::StreamExt;

/// How long a message may take to come.
const PATIENCE: Duration = Duration::from_secs(20);
/// After so long without one there is no message any more.
const QUIET: Duration = Duration::from_millis(500);

/// A quorum queue, and a consumer of it.
pub struct Queue {
    _connection: Connection,
    channel: Channel,
    consumer: Consumer,
    exchange: String,
    name: String,
}

/// A message that came.
pub struct Delivery {
    pub routing_key: String,
    pub message_id: String,
    pub content_type: String,
    pub delivery_mode: u8,
    pub timestamp: Option<u64>,
    pub headers: FieldTable,
    pub records: Vec<Record>,
}

impl Delivery {
    pub fn header(&self, name: &str) -> Option<String> {
        let value = self.headers.inner().get(name)?.as_long_string()?;
        Some(value.to_string())
    }
}

impl Queue {
    /// Declares the exchange and a queue, and consumes from it.
    pub async fn declare(url: &str, exchange: &str, name: &str, binding: &str) -> Queue {
        let (connection, channel, consumer) = consume(url, exchange, name).await;
        let queue = Queue {
            _connection: connection,
            channel,
            consumer,
            exchange: exchange.to_owned(),
            name: name.to_owned(),
        };
        queue.bind(binding).await;
        queue
    }

    /// The same queue, after the connection was lost.
    pub async fn reconnect(&mut self, url: &str) {
        let (connection, channel, consumer) = consume(url, &self.exchange, &self.name).await;
        (self._connection, self.channel, self.consumer) = (connection, channel, consumer);
    }

    pub async fn bind(&self, binding: &str) {
        let options = QueueBindOptions::default();
        let bound = self.channel.queue_bind(
            self.name.as_str().into(),
            self.exchange.as_str().into(),
            binding.into(),
            options,
            FieldTable::default(),
        );
        bound.await.expect("bound");
    }

    pub async fn delete_exchange(&self) {
        let options = ExchangeDeleteOptions::default();
        self.channel
            .exchange_delete(self.exchange.as_str().into(), options)
            .await
            .expect("deleted");
    }

    /// The next so many messages.
    pub async fn take(&mut self, count: usize) -> Vec<Delivery> {
        let mut taken = Vec::new();
        while taken.len() < count {
            let next = self.next(PATIENCE).await;
            taken.push(next.unwrap_or_else(|| panic!("{} of {count} messages", taken.len())));
        }
        taken
    }

    /// All messages that are there.
    pub async fn drain(&mut self) -> Vec<Delivery> {
        let mut taken = self.take(1).await;
        while let Some(next) = self.next(QUIET).await {
            taken.push(next);
        }
        taken
    }

    pub async fn nothing_more(&mut self) {
        if let Some(more) = self.next(QUIET).await {
            panic!("there is {} too", more.message_id);
        }
    }

    async fn next(&mut self, patience: Duration) -> Option<Delivery> {
        let delivery = timeout(patience, self.consumer.next()).await.ok()?;
        let delivery = delivery.expect("the queue stays").expect("the connection stays");
        delivery.ack(BasicAckOptions::default()).await.expect("acknowledged");
        let properties = &delivery.properties;
        let text = |text: &Option<lapin::types::ShortString>| {
            text.as_ref().map(ToString::to_string).unwrap_or_default()
        };
        Some(Delivery {
            routing_key: delivery.routing_key.to_string(),
            message_id: text(properties.message_id()),
            content_type: text(properties.content_type()),
            delivery_mode: properties.delivery_mode().unwrap_or_default(),
            timestamp: *properties.timestamp(),
            headers: properties.headers().clone().unwrap_or_default(),
            records: read_json_body(&delivery.data).expect("a body as it is documented"),
        })
    }
}

async fn consume(url: &str, exchange: &str, name: &str) -> (Connection, Channel, Consumer) {
    let connected = Connection::connect(url, ConnectionProperties::default()).await;
    let connection = connected.expect("the broker runs");
    let channel = connection.create_channel().await.expect("a channel");
    let durable = ExchangeDeclareOptions { durable: true, ..ExchangeDeclareOptions::default() };
    let declared = channel.exchange_declare(
        exchange.into(),
        ExchangeKind::Topic,
        durable,
        FieldTable::default(),
    );
    declared.await.expect("an exchange");
    let mut arguments = FieldTable::default();
    arguments.insert("x-queue-type".into(), AMQPValue::LongString("quorum".into()));
    let durable = QueueDeclareOptions { durable: true, ..QueueDeclareOptions::default() };
    channel.queue_declare(name.into(), durable, arguments).await.expect("a queue");
    let options = BasicConsumeOptions::default();
    let consumer =
        channel.basic_consume(name.into(), "test".into(), options, FieldTable::default());
    let consumer = consumer.await.expect("a consumer");
    (connection, channel, consumer)
}

/// The revisions of a partition's changes, as they came.
pub fn revisions(deliveries: &[Delivery], partition: u16) -> Vec<u64> {
    let records = deliveries.iter().flat_map(|delivery| &delivery.records);
    let changes = records.filter(|record| matches!(record, Record::Change(_)));
    changes.filter(|record| record.partition() == partition).map(Record::revision).collect()
}

/// The same without repeats.
pub fn first_occurrences(deliveries: &[Delivery], partition: u16) -> Vec<u64> {
    let mut seen = BTreeSet::new();
    let mut revisions = revisions(deliveries, partition);
    revisions.retain(|&revision| seen.insert(revision));
    revisions
}

/// A write of a key.
pub fn set(partition: u16, revision: u64, key: &[u8], value: &[u8]) -> Event {
    Event {
        op: Op::Set,
        key: Bytes::copy_from_slice(key),
        value: Some(Bytes::copy_from_slice(value)),
        partition,
        revision,
        version: revision,
        previous_version: 0,
        previous_value: None,
        expires_at_ms: None,
        committed_at_ms: 1,
        trace: None,
    }
}
