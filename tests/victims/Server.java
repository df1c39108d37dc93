import com.sun.net.httpserver.HttpExchange;
import com.sun.net.httpserver.HttpServer;
import java.io.IOException;
import java.net.InetSocketAddress;
import java.nio.charset.StandardCharsets;
import java.nio.file.Files;
import java.nio.file.Path;
import java.nio.file.StandardCopyOption;
import java.security.MessageDigest;
import java.util.ArrayList;
import java.util.HexFormat;
import java.util.List;
import java.util.TreeMap;
import java.util.concurrent.Executors;
import java.util.concurrent.atomic.AtomicLong;

/** usage: java Server PORT_FILE: an HTTP server with a heap of objects, compiled code, and an executor's threads. */
public class Server {
    static final TreeMap<String, long[]> data = new TreeMap<>();
    static final AtomicLong served = new AtomicLong();
    static final AtomicLong ticks = new AtomicLong();

    static String digest() throws Exception {
        MessageDigest hash = MessageDigest.getInstance("SHA-256");
        for (var entry : data.entrySet()) {
            hash.update(entry.getKey().getBytes(StandardCharsets.UTF_8));
            for (long value : entry.getValue()) hash.update(Long.toString(value).getBytes(StandardCharsets.UTF_8));
        }
        return HexFormat.of().formatHex(hash.digest());
    }

    static long mix(long n) {
        long h = n;
        for (int i = 0; i < 20000; i++) {
            h = (h ^ (h >>> 29)) * 0xbf58476d1ce4e5b9L + i;
            h ^= data.get("key" + (Math.floorMod(h, 100L))).length;
        }
        return h;
    }

    /** Allocates n megabytes, most of it garbage, and collects; the sum tells whether the live part was kept intact. */
    static long garbage(int n) {
        List<byte[]> live = new ArrayList<>();
        for (int i = 0; i < n; i++) {
            byte[] block = new byte[1 << 20];
            block[i % block.length] = (byte) i;
            if (i % 16 == 0) live.add(block);
        }
        System.gc();
        long sum = 0;
        for (byte[] block : live) for (byte value : block) sum += value;
        return sum;
    }

    static void answer(HttpExchange exchange) throws IOException {
        String text;
        try {
            String query = exchange.getRequestURI().getQuery();
            int n = query == null ? 0 : Integer.parseInt(query.substring(2));
            served.incrementAndGet();
            text = switch (exchange.getRequestURI().getPath()) {
                case "/digest" -> digest();
                case "/mix" -> Long.toString(mix(n));
                case "/garbage" -> Long.toString(garbage(n));
                case "/ticks" -> Long.toString(ticks.get());
                case "/thread" -> {
                    AtomicLong result = new AtomicLong();
                    Thread thread = new Thread(() -> result.set(mix(n)));
                    thread.start();
                    thread.join();
                    yield Long.toString(result.get());
                }
                default -> Long.toString(served.get());
            };
        } catch (Exception error) {
            text = "error " + error;
        }
        byte[] body = text.getBytes(StandardCharsets.UTF_8);
        exchange.getResponseHeaders().set("Connection", "close");
        exchange.sendResponseHeaders(200, body.length);
        exchange.getResponseBody().write(body);
        exchange.close();
    }

    public static void main(String[] arguments) throws Exception {
        for (int i = 0; i < 20000; i++) data.put("key" + i, new long[] {i, (long) i * i, ~i, i % 7});
        Thread ticker = new Thread(() -> {
            while (true) {
                try {
                    Thread.sleep(10);
                } catch (InterruptedException error) {
                    System.exit(3);
                }
                ticks.incrementAndGet();
            }
        });
        ticker.setDaemon(true);
        ticker.start();
        HttpServer server = HttpServer.create(new InetSocketAddress("127.0.0.1", 0), 0);
        server.createContext("/", Server::answer);
        server.setExecutor(Executors.newFixedThreadPool(4));
        server.start();
        Path path = Path.of(arguments[0]);
        Path temporary = Path.of(arguments[0] + ".new");
        Files.writeString(temporary, Integer.toString(server.getAddress().getPort()));
        Files.move(temporary, path, StandardCopyOption.ATOMIC_MOVE);
    }
}
