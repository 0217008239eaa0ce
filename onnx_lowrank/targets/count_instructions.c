/* A plugin of QEMU's user mode: instructions that a guest executes between two marks.
 *
 * The guest marks with getpriority(77, k), which no kernel knows; an even k begins a count, the
 * odd one after it ends it, and "k/2 count" becomes a line of the file that the plugin is given:
 *
 *     qemu-aarch64 -plugin libcount.so,out=counts.txt …
 *
 * QEMU's header is in no Debian package, so what is used of its interface is declared here;
 * PLUGIN_VERSION is the version of the interface, which the program that compiles this finds out.
 */
#include <inttypes.h>
#include <stdint.h>
#include <stdio.h>
#include <string.h>

typedef uint64_t qemu_plugin_id_t;
struct qemu_plugin_tb;
enum { CALLBACK_USES_NO_REGISTERS = 0 };

typedef void (*on_translate)(qemu_plugin_id_t, struct qemu_plugin_tb *);
typedef void (*on_execute)(unsigned int, void *);
typedef void (*on_syscall)(qemu_plugin_id_t, unsigned int, int64_t number, uint64_t a1, uint64_t a2,
                           uint64_t a3, uint64_t a4, uint64_t a5, uint64_t a6, uint64_t a7,
                           uint64_t a8);

void qemu_plugin_register_vcpu_tb_trans_cb(qemu_plugin_id_t, on_translate);
void qemu_plugin_register_vcpu_tb_exec_cb(struct qemu_plugin_tb *, on_execute, int flags, void *);
void qemu_plugin_register_vcpu_syscall_cb(qemu_plugin_id_t, on_syscall);
size_t qemu_plugin_tb_n_insns(const struct qemu_plugin_tb *);

#define EXPORTED __attribute__((visibility("default")))

EXPORTED int qemu_plugin_version = PLUGIN_VERSION;

enum { GETPRIORITY = 141, MARK = 77 };

static uint64_t count, begun;
static FILE *file;

static void executed(unsigned int cpu, void *instructions) {
    (void)cpu;
    count += (uint64_t)(uintptr_t)instructions;
}

static void translated(qemu_plugin_id_t id, struct qemu_plugin_tb *block) {
    (void)id;
    qemu_plugin_register_vcpu_tb_exec_cb(block, executed, CALLBACK_USES_NO_REGISTERS,
                                         (void *)(uintptr_t)qemu_plugin_tb_n_insns(block));
}

static void called(qemu_plugin_id_t id, unsigned int cpu, int64_t number, uint64_t a1, uint64_t a2,
                   uint64_t a3, uint64_t a4, uint64_t a5, uint64_t a6, uint64_t a7, uint64_t a8) {
    (void)id, (void)cpu, (void)a3, (void)a4, (void)a5, (void)a6, (void)a7, (void)a8;
    if (number != GETPRIORITY || (int)a1 != MARK || file == NULL)
        return;
    if (a2 % 2 == 0) {
        begun = count;
    } else {
        fprintf(file, "%" PRIu64 " %" PRIu64 "\n", a2 / 2, count - begun);
        fflush(file);
    }
}

EXPORTED int qemu_plugin_install(qemu_plugin_id_t id, const void *info, int argc, char **argv) {
    (void)info;
    for (int i = 0; i < argc; i++)
        if (strncmp(argv[i], "out=", 4) == 0)
            file = fopen(argv[i] + 4, "a");
    qemu_plugin_register_vcpu_tb_trans_cb(id, translated);
    qemu_plugin_register_vcpu_syscall_cb(id, called);
    return 0;
}
