import java.io.ByteArrayOutputStream;
import java.net.StandardProtocolFamily;
import java.net.UnixDomainSocketAddress;
import java.nio.ByteBuffer;
import java.nio.channels.ServerSocketChannel;
import java.nio.channels.SocketChannel;
import java.nio.charset.StandardCharsets;
import java.security.MessageDigest;
import java.util.HexFormat;
import java.util.LinkedHashMap;
import java.util.Map;
import java.util.Random;

/**
 * usage: java JvmWorker SOCKET [MEGABYTES]: worker.py's service on a JVM, without /fork: a child of fork() has none of
 * the threads that a JVM works with. The JDK's own HTTP server knows no Unix sockets, so this one reads its requests itself.
 */
public class JvmWorker {
    static final int ROWS_TOUCHED = 64, VOCABULARY = 60_000, ROW = 256, ROWS = 1024;

    record Word(int number, double half, String text) {}

    static float[][] blocks;
    static final Map<String, Word> words = new LinkedHashMap<>();

    static void update(MessageDigest hash, float[] block, int from, int to, float factor) {
        ByteBuffer bytes = ByteBuffer.allocate((to - from) * Float.BYTES);
        for (int i = from; i < to; i++) bytes.putFloat(block[i] * factor);
        hash.update(bytes.flip());
    }

    static String part() throws Exception {
        MessageDigest hash = MessageDigest.getInstance("SHA-256");
        for (int i = 0; i < Math.min(ROWS_TOUCHED, blocks.length); i += 8)
            update(hash, blocks[i], i * ROW, (i + 1) * ROW, 2);
        for (int i = 0; i < VOCABULARY; i += VOCABULARY / ROWS_TOUCHED)
            hash.update(words.get("word-" + i).toString().getBytes(StandardCharsets.UTF_8));
        return HexFormat.of().formatHex(hash.digest());
    }

    static String whole() throws Exception {
        MessageDigest hash = MessageDigest.getInstance("SHA-256");
        for (float[] block : blocks) update(hash, block, 0, block.length, 1);
        for (var entry : words.entrySet())
            hash.update((entry.getKey() + entry.getValue()).getBytes(StandardCharsets.UTF_8));
        return HexFormat.of().formatHex(hash.digest());
    }

    /** The first line of the request, read up to the empty line at its end. */
    static String request(SocketChannel connection) throws Exception {
        ByteArrayOutputStream text = new ByteArrayOutputStream();
        ByteBuffer buffer = ByteBuffer.allocate(4096);
        while (!text.toString(StandardCharsets.US_ASCII).endsWith("\r\n\r\n") && connection.read(buffer) >= 0) {
            text.write(buffer.array(), 0, buffer.position());
            buffer.clear();
        }
        return text.toString(StandardCharsets.US_ASCII).lines().findFirst().orElse("");
    }

    static void answer(SocketChannel connection) throws Exception {
        String[] parts = request(connection).split(" ");
        String digest = switch (parts.length > 1 ? parts[1] : "") {
            case "/all" -> whole();
            case "/empty" -> "";
            default -> part();
        };
        String body = "{\"digest\": \"" + digest + "\"}";
        String head = "HTTP/1.0 200 OK\r\nContent-Length: " + body.length() + "\r\n\r\n";
        ByteBuffer bytes = ByteBuffer.wrap((head + body).getBytes(StandardCharsets.US_ASCII));
        while (bytes.hasRemaining()) connection.write(bytes);
    }

    public static void main(String[] arguments) throws Exception {
        Random random = new Random(7);
        blocks = new float[arguments.length > 1 ? Integer.parseInt(arguments[1]) : 64][ROWS * ROW];
        for (float[] block : blocks) for (int i = 0; i < block.length; i++) block[i] = random.nextInt(1000) / 8f;
        for (int i = 0; i < VOCABULARY; i++) words.put("word-" + i, new Word(i, i * 0.5, Integer.toString(i)));
        try (ServerSocketChannel server = ServerSocketChannel.open(StandardProtocolFamily.UNIX)) {
            server.bind(UnixDomainSocketAddress.of(arguments[0]));
            while (true) {
                try (SocketChannel connection = server.accept()) {
                    answer(connection);
                }
            }
        }
    }
}
