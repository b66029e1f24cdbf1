// SPDX-License-Identifier: GPL-2.0
/*
 * What an attacker does who can load a kernel module: changes pages behind everybody's back. For tests.
 *
 * It does nothing when it is loaded; root then writes one line per attack to
 * /sys/module/tamper/parameters/attack:
 *
 *   page PATH OFFSET XOR   one byte of a file's page cache; neither inode nor page is marked
 *   text ADDRESS XOR       one byte of kernel or module memory, through a writable alias of its page
 */
#include <linux/fs.h>
#include <linux/highmem.h>
#include <linux/mm.h>
#include <linux/module.h>
#include <linux/pagemap.h>
#include <linux/slab.h>
#include <linux/uaccess.h>
#include <linux/vmalloc.h>

static int flip_page(const char *path, loff_t offset, u8 xor)
{
	struct file *file = filp_open(path, O_RDONLY, 0);
	struct page *page;
	u8 *at;

	if (IS_ERR(file))
		return PTR_ERR(file);
	page = read_mapping_page(file->f_mapping, offset >> PAGE_SHIFT, file);
	if (IS_ERR(page)) {
		filp_close(file, NULL);
		return PTR_ERR(page);
	}
	at = kmap_local_page(page);
	at[offset_in_page(offset)] ^= xor;
	kunmap_local(at);
	put_page(page);
	filp_close(file, NULL);
	return 0;
}

static int flip_text(unsigned long address, u8 xor)
{
	bool module = address >= MODULES_VADDR && address < MODULES_END;
	struct page *page = module ? vmalloc_to_page((void *)address) : virt_to_page((void *)address);
	u8 *at;

	if (!page)
		return -EFAULT;
	at = vmap(&page, 1, VM_MAP, PAGE_KERNEL);
	if (!at)
		return -ENOMEM;
	at[offset_in_page(address)] ^= xor;
	vunmap(at);
	return 0;
}

static int attack(const char *line, const struct kernel_param *param)
{
	char path[256];
	unsigned long long where;
	unsigned int xor;

	if (sscanf(line, "page %255s %llx %x", path, &where, &xor) == 3)
		return flip_page(path, where, xor);
	if (sscanf(line, "text %llx %x", &where, &xor) == 2)
		return flip_text(where, xor);
	return -EINVAL;
}

static const struct kernel_param_ops ops = { .set = attack };
module_param_cb(attack, &ops, NULL, 0200);
MODULE_LICENSE("GPL");
MODULE_DESCRIPTION("Staging of attacks for tests");
